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
// Launch. 512 threads a block, a block for up to eight queries, as few as keep every multiprocessor busy. Where there are
// no more queries than multiprocessors, a block for each, with a smaller sample that its threads keep in registers.
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
// memory, [words][kMaxQueries].
template <typename Visit>
__device__ __forceinline__ void visit_sample(const DeviceSearch& search, int64_t samples, int64_t first_query,
                                             int queries, const uint32_t* query_words, Visit visit) {
  for (int64_t i = threadIdx.x; i < samples; i += kBlockThreads) {
    const int64_t position = sampled_position(i, samples, search.codes.count);
    int distances[kMaxQueries] = {};
    for (int word = 0; word < search.codes.words(); ++word) {
      const uint32_t code = search.codes.word(position, word);
#pragma unroll
      for (int q = 0; q < kMaxQueries; ++q) distances[q] += __popc(code ^ query_words[word * kMaxQueries + q]);
    }
#pragma unroll
    for (int q = 0; q < kMaxQueries; ++q)
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

// A query's limit, once its samples have been counted by distance and, at the distance that `nearest` tells, by section; by a
// whole warp.
__device__ __forceinline__ void set_limit(const DeviceSearch& search, const HammingSample& sample,
                                          const Candidates& candidates, int64_t query, const Reached& nearest,
                                          const unsigned* ties) {
  uint64_t limit = candidates.layout.key(search.bits(), search.codes.count - 1);  // all codes, if so few may be found
  if (nearest.index <= search.bits()) {
    const Reached section = reach(ties, kSections, nearest.rank);
    const int64_t position = find_tie(search, sample.count, query, section.index, section.rank, nearest.index);
    limit = candidates.layout.key(nearest.index, position);
  }
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads);
  if (lane < Candidates::kSteps) candidates.nearer[query * Candidates::kSteps + lane] = 0;
  if (lane == 0) {
    candidates.limits[query] = limit;
    candidates.counts[query] = 0;
  }
}

__global__ void __launch_bounds__(kBlockThreads, 2)
    limits_kernel(DeviceSearch search, HammingSample sample, Candidates candidates, int queries_a_block) {
  __shared__ unsigned ties[kMaxQueries][kSections];
  __shared__ int distances[kMaxQueries];
  auto* query_words = dynamic_shared<uint32_t>();
  uint32_t* const histograms = query_words + search.codes.words() * kMaxQueries;  // [queries_a_block][bins]
  wait_for_last_kernel();  // which lets the scan's blocks come
  const int bins = search.bits() + 1;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * queries_a_block;
  const int queries = static_cast<int>(min(static_cast<int64_t>(queries_a_block), search.queries.count - first));
  const int warp = static_cast<int>(threadIdx.x / kWarpThreads);

  for (int i = threadIdx.x; i < search.codes.words() * kMaxQueries; i += kBlockThreads)
    query_words[i] = i % kMaxQueries < queries ? search.queries.word(first + i % kMaxQueries, i / kMaxQueries) : 0;
  for (int i = threadIdx.x; i < queries * bins; i += kBlockThreads) histograms[i] = 0;
  for (int i = threadIdx.x; i < queries * kSections; i += kBlockThreads) ties[i / kSections][i % kSections] = 0;
  __syncthreads();
  visit_sample(search, sample.count, first, queries, query_words,
               [&](int q, int64_t, int distance) { atomicAdd(&histograms[q * bins + distance], 1u); });
  __syncthreads();
  Reached nearest{};
  if (warp < queries) {
    nearest = reach(histograms + warp * bins, bins, sample.rank);
    if (threadIdx.x % kWarpThreads == 0) distances[warp] = nearest.index;
  }
  __syncthreads();
  visit_sample(search, sample.count, first, queries, query_words, [&](int q, int64_t i, int distance) {
    if (distance == distances[q]) atomicAdd(&ties[q][i * kSections / sample.count], 1u);
  });
  __syncthreads();
  if (warp < queries) set_limit(search, sample, candidates, first + warp, nearest, ties[warp]);
}

// A block a query, whose sample each thread reads at once and keeps: a single query waits for memory three times.
__global__ void __launch_bounds__(kBlockThreads, 1)
    limit_kernel(DeviceSearch search, HammingSample sample, Candidates candidates) {
  constexpr int kKept = HammingSample::kMaxCountOfFew / kBlockThreads;
  __shared__ unsigned ties[kSections];
  __shared__ int tied_distance;
  auto* histogram = dynamic_shared<unsigned>();
  wait_for_last_kernel();
  const int bins = search.bits() + 1;
  const int64_t query = blockIdx.x;

  int64_t positions[kKept];
  int distances[kKept] = {};
#pragma unroll
  for (int i = 0; i < kKept; ++i)
    positions[i] = sampled_position(min(static_cast<int64_t>(i * kBlockThreads + threadIdx.x), sample.count - 1),
                                    sample.count, search.codes.count);
  for (int word = 0; word < search.codes.words(); ++word) {
    const uint32_t query_word = search.queries.word(query, word);
#pragma unroll
    for (int i = 0; i < kKept; ++i) distances[i] += __popc(search.codes.word(positions[i], word) ^ query_word);
  }
  for (int i = threadIdx.x; i < bins; i += kBlockThreads) histogram[i] = 0;
  if (threadIdx.x < kSections) ties[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (i * kBlockThreads + threadIdx.x >= sample.count || !search.may_find(query, positions[i])) distances[i] = -1;
    if (distances[i] >= 0) atomicAdd(&histogram[distances[i]], 1u);
  }
  __syncthreads();
  Reached nearest{};
  if (threadIdx.x < kWarpThreads) {
    nearest = reach(histogram, bins, sample.rank);
    if (threadIdx.x == 0) tied_distance = nearest.index;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kKept; ++i)
    if (distances[i] == tied_distance)
      atomicAdd(&ties[(i * kBlockThreads + threadIdx.x) * kSections / sample.count], 1u);
  __syncthreads();
  if (threadIdx.x < kWarpThreads) set_limit(search, sample, candidates, query, nearest, ties);
}

}  // namespace

void launch_hamming_limits(const HammingSearch& search, const HammingSample& sample, const Candidates& candidates,
                           cudaStream_t stream) {
  const int64_t bins = 8 * search.code_bytes + 1, words = ceil_div<int64_t>(search.code_bytes, 4);
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  if (search.query_count <= multiprocessors && sample.count <= HammingSample::kMaxCountOfFew) {
    const LaunchShape shape{search.query_count, kBlockThreads, bins * int64_t{sizeof(unsigned)}};
    return launch(limit_kernel, shape, stream, DeviceSearch(search), sample, candidates);
  }
  const int64_t most = std::min<int64_t>(kMaxQueries, HammingSample::kMaxBins / bins);
  const int64_t queries_a_block = std::clamp<int64_t>(search.query_count / multiprocessors, 1, most);
  const LaunchShape shape{ceil_div(search.query_count, queries_a_block), kBlockThreads,
                          (words * kMaxQueries + queries_a_block * bins) * int64_t{sizeof(uint32_t)}};
  launch(limits_kernel, shape, stream, DeviceSearch(search), sample, candidates, static_cast<int>(queries_a_block));
}

}  // namespace hashengine
