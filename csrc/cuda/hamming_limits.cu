// How far the nearest codes of a query may be: a guess from a sample of the database.
//
// Idea. The sample has a code from each of `count` equal stretches of the database, at a place that a hash draws, so
// that neither order nor period of the codes bends it. The code of a given rank in it, by (distance, position), is the
// limit. Its distance comes from a histogram; the position, where several share that distance, from counting those in
// 64 sections of the sample and walking through one of them.
//
// Traffic. A sample is read twice for up to eight queries, a 32-byte sector a code: with 16,384 codes 128 KB a query
// from the L2 cache. About ten instructions and an atomic in shared memory a distance of 64 bits. A block of one query,
// which is as fast as memory answers, keeps the distances and reads the sample once, eight codes a thread under way.
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

// The samples, each drawn from a stretch of the codes of its own. Divisions of 64 bits would take longer than the
// distances do, so the stretches' length is a fixed-point number, `1 << kFraction` a code.
struct Stretches {
  static constexpr int kFraction = 30;  // with 2^32 codes or fewer no product overflows

  int count;
  uint64_t length;

  Stretches(int64_t count, int64_t codes)
      : count(static_cast<int>(count)), length(static_cast<uint64_t>((codes << kFraction) / count)) {}

  __device__ __forceinline__ int64_t position(int index) const {
    uint32_t hash = static_cast<uint32_t>(index);  // the finaliser of MurmurHash3 (Appleby)
    hash = (hash ^ hash >> 16) * 0x85ebca6bu;
    hash = (hash ^ hash >> 13) * 0xc2b2ae35u;
    hash ^= hash >> 16;
    const uint64_t begin = static_cast<uint64_t>(index) * length, end = begin + length;
    const auto width = static_cast<uint32_t>((end >> kFraction) - (begin >> kFraction));
    return static_cast<int64_t>((begin >> kFraction) + (static_cast<uint64_t>(hash) * width >> 32));
  }
};

// Where the running sum of `counts` reaches `rank`, and what is left of the rank there; a whole warp calls. The index
// is `count` where the sum does not get so far.
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

// Calls visit(query, sample, distance) for each sampled code that the block's queries may find. Their words are in
// shared memory, [words][kQueries]. Several codes at once, as each is a line of memory of its own.
template <int kQueries, typename Visit>
__device__ __forceinline__ void visit_sample(const DeviceSearch& search, const Stretches& stretches,
                                             int64_t first_query, int queries, const uint32_t* query_words,
                                             Visit visit) {
  constexpr int kCodes = kQueries == 1 ? 8 : 2;
  for (int first = threadIdx.x; first < stretches.count; first += kCodes * kBlockThreads) {
    int64_t positions[kCodes];
    int distances[kCodes][kQueries] = {};
#pragma unroll
    for (int c = 0; c < kCodes; ++c)
      positions[c] = stretches.position(min(first + c * kBlockThreads, stretches.count - 1));
    for (int word = 0; word < search.codes.words(); ++word) {
      uint32_t codes[kCodes];
      if (search.codes.has_whole_words) {
#pragma unroll
        for (int c = 0; c < kCodes; ++c) codes[c] = search.codes.whole_word(positions[c], word);
      } else {
#pragma unroll
        for (int c = 0; c < kCodes; ++c) codes[c] = search.codes.word(positions[c], word);
      }
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        const uint32_t of_query = query_words[word * kQueries + q];
#pragma unroll
        for (int c = 0; c < kCodes; ++c) distances[c][q] += __popc(codes[c] ^ of_query);
      }
    }
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int sample = first + c * kBlockThreads;
      if (sample >= stretches.count) break;
#pragma unroll
      for (int q = 0; q < kQueries; ++q)
        if (q < queries && search.may_find(first_query + q, positions[c])) visit(q, sample, distances[c][q]);
    }
  }
}

// Which sample of a section is the `rank`-th for which is_tie(sample); a whole warp calls.
template <typename IsTie>
__device__ __forceinline__ int find_tie(int section, int size, int64_t rank, IsTie is_tie) {
  const int begin = section * size, end = begin + size;
  for (int first = begin; first < end; first += kWarpThreads) {
    const int sample = first + static_cast<int>(threadIdx.x % kWarpThreads);
    unsigned ties = __ballot_sync(kWholeWarp, sample < end && is_tie(sample));
    if (rank > __popc(ties)) {
      rank -= __popc(ties);
      continue;
    }
    for (; rank > 1; --rank) ties &= ties - 1;
    return first + __ffs(static_cast<int>(ties)) - 1;
  }
  return end - 1;  // not reached: the section holds as many
}

constexpr uint16_t kNotFound = 0xffff;  // in place of a distance

template <int kQueries>
__global__ void __launch_bounds__(kBlockThreads, 2)
    limits_kernel(DeviceSearch search, Stretches stretches, int64_t rank, Candidates candidates, int queries_a_block) {
  constexpr bool kKeeps = kQueries == 1;  // the distances, so that the sample is read once
  __shared__ unsigned ties[kQueries][kSections];
  __shared__ int distances[kQueries];
  auto* query_words = dynamic_shared<uint32_t>();
  uint32_t* const histograms = query_words + search.codes.words() * kQueries;  // [queries_a_block][bins]
  wait_for_last_kernel();                                                      // which lets the scan's blocks come
  const int bins = search.bits() + 1;
  auto* const kept = reinterpret_cast<uint16_t*>(histograms + queries_a_block * bins);  // [samples]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * queries_a_block;
  const int queries = static_cast<int>(min(static_cast<int64_t>(queries_a_block), search.queries.count - first));
  const int warp = static_cast<int>(threadIdx.x / kWarpThreads);
  const int section_size = stretches.count / kSections;

  for (int i = threadIdx.x; i < search.codes.words() * kQueries; i += kBlockThreads)
    query_words[i] = i % kQueries < queries ? search.queries.word(first + i % kQueries, i / kQueries) : 0;
  for (int i = threadIdx.x; i < queries * bins; i += kBlockThreads) histograms[i] = 0;
  for (int i = threadIdx.x; i < queries * kSections; i += kBlockThreads) ties[i / kSections][i % kSections] = 0;
  for (int i = threadIdx.x; i < queries * Candidates::kSteps; i += kBlockThreads)
    candidates.nearer[first * Candidates::kSteps + i] = 0;
  if constexpr (kKeeps)
    for (int i = threadIdx.x; i < stretches.count; i += kBlockThreads) kept[i] = kNotFound;
  __syncthreads();
  visit_sample<kQueries>(search, stretches, first, queries, query_words, [&](int q, int sample, int distance) {
    atomicAdd(&histograms[q * bins + distance], 1u);
    if constexpr (kKeeps) kept[sample] = static_cast<uint16_t>(distance);
  });
  __syncthreads();
  Reached nearest{};
  if (warp < queries) {
    nearest = reach(histograms + warp * bins, bins, rank);
    if (threadIdx.x % kWarpThreads == 0) distances[warp] = nearest.index;
  }
  __syncthreads();
  if constexpr (kKeeps) {
    for (int i = threadIdx.x; i < stretches.count; i += kBlockThreads)
      if (kept[i] == distances[0]) atomicAdd(&ties[0][i / section_size], 1u);
  } else {
    visit_sample<kQueries>(search, stretches, first, queries, query_words, [&](int q, int sample, int distance) {
      if (distance == distances[q]) atomicAdd(&ties[q][sample / section_size], 1u);
    });
  }
  __syncthreads();
  if (warp >= queries) return;

  const int64_t query = first + warp;
  uint64_t limit = candidates.layout.key(search.bits(), search.codes.count - 1);  // all codes, if so few may be found
  if (nearest.index < bins) {
    const Reached section = reach(ties[warp], kSections, nearest.rank);
    const int sample = find_tie(section.index, section_size, section.rank, [&](int sample) {
      if constexpr (kKeeps) {
        return kept[sample] == nearest.index;
      } else {
        const int64_t position = stretches.position(sample);
        return search.may_find(query, position) && search.distance(query, position) == nearest.index;
      }
    });
    limit = candidates.layout.key(nearest.index, stretches.position(sample));
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
                          (words * unrolled + queries_a_block * bins) * int64_t{sizeof(uint32_t)} +
                              (unrolled == 1 ? sample.count * int64_t{sizeof(uint16_t)} : 0)};
  launch(unrolled == 1 ? limits_kernel<1> : limits_kernel<kMaxQueries>, shape, stream, DeviceSearch(search),
         Stretches(sample.count, search.code_count), sample.rank, candidates, static_cast<int>(queries_a_block));
}

}  // namespace hashengine
