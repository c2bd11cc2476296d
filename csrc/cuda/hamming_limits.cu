// How far the nearest codes of a query may be: a guess from a sample of the database.
//
// Idea. The sample has a code from each of `count` equal stretches of the database, at a place that a hash draws, so that
// neither order nor period of the codes bends it. The code of a given rank in it, by (distance, position), is the limit.
// Its distance comes from a histogram; the position, where several share that distance, from counting those in 64
// sections of the sample and walking through one of them.
//
// Traffic. A sample is read twice for up to eight queries, a 32-byte sector a code: with 16,384 codes 128 KB a query from
// the L2 cache. About ten instructions and an atomic in shared memory a distance of 64 bits.
//
// Launch. 512 threads a block, a block for one query or up to eight, as few as keep every multiprocessor busy.
//
// Limits. Distances below HammingSample::kMaxBins.

#include <algorithm>

#include "hamming_topk.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace hashengine {
namespace {

constexpr int kBlockThreads = 512;
constexpr int kMaxQueries = 8;  // a block of many
constexpr int kSections = HammingSample::kSections;

__device__ __forceinline__ uint64_t mix(uint64_t x) {  // the finaliser of SplitMix64 (Steele, Lea, Flood, 2014)
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

// The code that stands for stretch `index` of `count`; codes * count < 2^62.
__device__ __forceinline__ int64_t sampled_position(int64_t index, int64_t count, int64_t codes) {
  const int64_t begin = index * codes / count, end = (index + 1) * codes / count;
  return begin + static_cast<int64_t>(mix(static_cast<uint64_t>(index)) % static_cast<uint64_t>(end - begin));
}

// Where the running sum of `counts` reaches `rank`, and what is left of the rank there; a whole warp calls. The index is
// `count` where the sum does not get so far.
struct Reached {
  int index;
  int64_t rank;
};
__device__ __forceinline__ Reached reach(const unsigned* counts, int count, int64_t rank) {
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads);
  for (int first = 0; first < count; first += kWarpThreads) {
    const unsigned own = first + lane < count ? counts[first + lane] : 0;
    unsigned sum = own;
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      const unsigned before = __shfl_up_sync(kWholeWarp, sum, distance);
      if (lane >= distance) sum += before;
    }
    const unsigned reached = __ballot_sync(kWholeWarp, sum >= rank);
    if (reached != 0) {
      const int there = __ffs(static_cast<int>(reached)) - 1;
      return {first + there, rank - __shfl_sync(kWholeWarp, sum - own, there)};
    }
    rank -= __shfl_sync(kWholeWarp, sum, kWarpThreads - 1);
  }
  return {count, rank};
}

// Calls visit(query, sample, distance) for each sampled code that the block's queries may find. Their words are in shared
// memory, [words][kQueries].
template <int kQueries, typename Visit>
__device__ __forceinline__ void visit_sample(const DeviceSearch& search, int64_t samples, int64_t first_query,
                                             int queries, const uint32_t* query_words, Visit visit) {
  for (int64_t i = threadIdx.x; i < samples; i += kBlockThreads) {
    const int64_t position = sampled_position(i, samples, search.codes.count);
    int distances[kQueries] = {};
    for (int word = 0; word < search.codes.words(); ++word) {
      const uint32_t code = search.codes.word(position, word);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) distances[q] += __popc(code ^ query_words[word * kQueries + q]);
    }
#pragma unroll
    for (int q = 0; q < kQueries; ++q)
      if (q < queries && search.may_find(first_query + q, position)) visit(q, i, distances[q]);
  }
}

// Where the `rank`-th code of that distance in a section is; a whole warp calls.
__device__ __forceinline__ int64_t find_tie(const DeviceSearch& search, int64_t samples, int64_t query, int section,
                                            int64_t rank, int distance) {
  const int64_t size = samples / kSections, begin = section * size;
  for (int64_t i = begin; i < begin + size; i += kWarpThreads) {
    const int64_t index = i + threadIdx.x % kWarpThreads;
    const int64_t position = sampled_position(min(index, begin + size - 1), samples, search.codes.count);
    unsigned ties = __ballot_sync(kWholeWarp, index < begin + size && search.may_find(query, position) &&
                                                  search.distance(query, position) == distance);
    if (rank > __popc(ties)) {
      rank -= __popc(ties);
      continue;
    }
    for (; rank > 1; --rank) ties &= ties - 1;
    return __shfl_sync(kWholeWarp, position, __ffs(static_cast<int>(ties)) - 1);
  }
  return search.codes.count - 1;  // not reached: the section holds as many
}

template <int kQueries>
__global__ void __launch_bounds__(kBlockThreads, 2)
    limits_kernel(DeviceSearch search, HammingSample sample, Candidates candidates, int queries_a_block) {
  __shared__ unsigned ties[kQueries][kSections];
  __shared__ int distances[kQueries];
  auto* query_words = dynamic_shared<uint32_t>();
  uint32_t* const histograms = query_words + search.codes.words() * kQueries;  // [queries_a_block][bins]
  const int bins = search.bits() + 1;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * queries_a_block;
  const int queries = static_cast<int>(min(static_cast<int64_t>(queries_a_block), search.queries.count - first));
  const int warp = static_cast<int>(threadIdx.x / kWarpThreads);

  for (int i = threadIdx.x; i < search.codes.words() * kQueries; i += kBlockThreads)
    query_words[i] = i % kQueries < queries ? search.queries.word(first + i % kQueries, i / kQueries) : 0;
  for (int i = threadIdx.x; i < queries * bins; i += kBlockThreads) histograms[i] = 0;
  for (int i = threadIdx.x; i < queries * kSections; i += kBlockThreads) ties[i / kSections][i % kSections] = 0;
  for (int i = threadIdx.x; i < queries * Candidates::kSteps; i += kBlockThreads)
    candidates.nearer[first * Candidates::kSteps + i] = 0;
  __syncthreads();
  visit_sample<kQueries>(search, sample.count, first, queries, query_words, [&](int q, int64_t, int distance) {
    atomicAdd(&histograms[q * bins + distance], 1u);
  });
  __syncthreads();
  Reached nearest{};
  if (warp < queries) {
    nearest = reach(histograms + warp * bins, bins, sample.rank);
    if (threadIdx.x % kWarpThreads == 0) distances[warp] = nearest.index;
  }
  __syncthreads();
  visit_sample<kQueries>(search, sample.count, first, queries, query_words, [&](int q, int64_t i, int distance) {
    if (distance == distances[q]) atomicAdd(&ties[q][i * kSections / sample.count], 1u);
  });
  __syncthreads();
  if (warp >= queries) return;

  const int64_t query = first + warp;
  uint64_t limit = candidates.layout.key(search.bits(), search.codes.count - 1);  // all codes, if so few may be found
  if (nearest.index < bins) {
    const Reached section = reach(ties[warp], kSections, nearest.rank);
    const int64_t position = find_tie(search, sample.count, query, section.index, section.rank, nearest.index);
    limit = candidates.layout.key(nearest.index, position);
  }
  if (threadIdx.x % kWarpThreads == 0) {
    candidates.limits[query] = limit;
    candidates.counts[query] = 0;
  }
}

}  // namespace

void launch_hamming_limits(const HammingSearch& search, const HammingSample& sample, const Candidates& candidates,
                           cudaStream_t stream) {
  const int64_t bins = 8 * search.code_bytes + 1;
  const int64_t most = std::min<int64_t>(kMaxQueries, HammingSample::kMaxBins / bins);
  const int64_t busy = ceil_div(search.query_count, device_attribute(cudaDevAttrMultiProcessorCount));
  const int64_t queries_a_block = std::clamp<int64_t>(busy, 1, most);
  const int64_t unrolled = queries_a_block == 1 ? 1 : kMaxQueries;
  const int64_t words = ceil_div<int64_t>(search.code_bytes, 4);
  const LaunchShape shape{ceil_div(search.query_count, queries_a_block), kBlockThreads,
                          (words * unrolled + queries_a_block * bins) * int64_t{sizeof(uint32_t)}};
  launch(unrolled == 1 ? limits_kernel<1> : limits_kernel<kMaxQueries>, shape, stream, DeviceSearch(search), sample,
         candidates, static_cast<int>(queries_a_block));
}

}  // namespace hashengine
