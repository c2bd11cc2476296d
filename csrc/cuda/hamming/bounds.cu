// Estimates a bound for each query of hamming_topk from a sample of the database.
//
// Idea. The sample is stratified: the database is divided into equal parts (strata), and each gives one code to the
// sample. A hash chooses the position within the stratum, so that neither a sorted nor a periodic database biases the
// sample. The bound is the key of the sampled code that has a given rank in the order (distance, position). A histogram
// of the sampled distances gives the bound's distance. Several sampled codes may have that distance; these are the
// ties. The kernel counts the ties in each of 64 sections of the sample, which gives the section of the bound. It then
// searches this section for the bound's position.
//
// Traffic. A block with two to eight queries reads the sample twice, about one 32-byte sector per code of up to 256
// bits. For a sample of 16,384 codes and eight queries that is 128 KB per query, from L2. To compute and count the
// distance of two 64-bit codes takes about ten instructions (estimated) and an atomic in shared memory. A block with a
// single query is limited by memory latency. Therefore it keeps the distances in shared memory instead of reading the
// sample twice, and has eight loads per thread in flight.
//
// Launch. 512 threads per block. The number of queries per block is the number of queries per SM, rounded up, but at
// most eight. It is smaller if the histograms of so many queries would have more than HammingSample::kMaxBins bins.
//
// Limits. Fewer than 2^32 codes, each of fewer than HammingSample::kMaxBins bits.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/hamming/topk_steps.h"

namespace hashengine {
namespace {

constexpr int kBlockThreads = 512;
constexpr int kMaxQueriesPerBlock = 8;
constexpr int kSections = HammingSample::kSections;

// The strata of the database. Their length is a fixed-point number, so that computing a position needs no 64-bit
// division. A division is assumed to take longer than computing the distances.
struct Strata {
  static constexpr int kFractionBits = 30;  // for up to 2^32 codes, index * length fits in 64 bits

  int count;
  uint64_t length;  // codes per stratum, scaled by 2^kFractionBits

  Strata(int64_t strata_count, int64_t codes)
      : count(static_cast<int>(strata_count)), length(static_cast<uint64_t>((codes << kFractionBits) / strata_count)) {}

  // The position of the code that the sample takes from stratum `index`.
  __device__ __forceinline__ int64_t position(int index) const {
    uint32_t hash = static_cast<uint32_t>(index);  // the finaliser of MurmurHash3 (Appleby)
    hash = (hash ^ hash >> 16) * 0x85ebca6bu;
    hash = (hash ^ hash >> 13) * 0xc2b2ae35u;
    hash ^= hash >> 16;
    const uint64_t begin = static_cast<uint64_t>(index) * length, end = begin + length;
    const auto width = static_cast<uint32_t>((end >> kFractionBits) - (begin >> kFractionBits));
    return static_cast<int64_t>((begin >> kFractionBits) + (static_cast<uint64_t>(hash) * width >> 32));
  }
};

// The bin of a histogram that contains the element of a given rank.
struct RankedBin {
  int index;     // the index of the bin, or the number of bins if the histogram has too few elements
  int64_t rank;  // the element's rank within the bin, counted from 1
};

// Finds the bin at which the running sum of `counts` reaches `rank`. The whole warp must call.
__device__ __forceinline__ RankedBin find_bin(const unsigned* counts, int count, int64_t rank) {
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
      const int bin = __ffs(static_cast<int>(reached)) - 1;
      return {first + bin, rank - __shfl_sync(kWholeWarp, sum - own, bin)};
    }
    rank -= __shfl_sync(kWholeWarp, sum, kWarpThreads - 1);
  }
  return {count, rank};
}

// Calls visit(q, sample, distance) for each query first_query + q of the block and each sampled code that passes the
// filter of this query. `sample` is the number of the code in the sample. The queries' words are in shared memory,
// [words][kQueries]. Most sampled codes are in different cache lines. Therefore a thread processes several codes at a
// time, which keeps several loads in flight.
template <int kQueries, typename Visit>
__device__ __forceinline__ void visit_sample(const DeviceSearch& search, const Strata& strata, int64_t first_query,
                                             int queries, const uint32_t* query_words, Visit visit) {
  constexpr int kCodes = kQueries == 1 ? 8 : 2;
  for (int first = threadIdx.x; first < strata.count; first += kCodes * kBlockThreads) {
    int64_t positions[kCodes];
    int distances[kCodes][kQueries] = {};
#pragma unroll
    for (int c = 0; c < kCodes; ++c) positions[c] = strata.position(min(first + c * kBlockThreads, strata.count - 1));
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
        const uint32_t query_word = query_words[word * kQueries + q];
#pragma unroll
        for (int c = 0; c < kCodes; ++c) distances[c][q] += __popc(codes[c] ^ query_word);
      }
    }
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int sample = first + c * kBlockThreads;
      if (sample >= strata.count) break;
#pragma unroll
      for (int q = 0; q < kQueries; ++q)
        if (q < queries && search.passes_filter(first_query + q, positions[c])) visit(q, sample, distances[c][q]);
    }
  }
}

// Returns the `rank`-th tie, counted from 1, of a section of `size` sampled codes. is_tie(sample) says whether a
// sampled code is a tie. The whole warp must call.
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
  return end - 1;  // unreachable: the section has at least `rank` ties
}

constexpr uint16_t kFilteredOut = 0xffff;  // stored for a code that the filter excludes, instead of its distance

// kQueries is 1 if queries_per_block is 1, otherwise kMaxQueriesPerBlock.
template <int kQueries>
__global__ void __launch_bounds__(kBlockThreads, 2)
    bounds_kernel(DeviceSearch search, Strata strata, int64_t rank, Candidates candidates, int queries_per_block) {
  constexpr bool kStoresDistances = kQueries == 1;
  __shared__ unsigned ties[kQueries][kSections];
  __shared__ int distances[kQueries];
  auto* query_words = dynamic_shared<uint32_t>();
  uint32_t* const histograms = query_words + search.codes.words() * kQueries;  // [queries_per_block][bins]
  wait_for_previous_kernel();  // lets the scan start early; does not wait, because this launch is not programmatic
  const int bins = search.bits() + 1;
  auto* const stored = reinterpret_cast<uint16_t*>(histograms + queries_per_block * bins);  // distances, [strata.count]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * queries_per_block;
  const int queries = static_cast<int>(min(static_cast<int64_t>(queries_per_block), search.queries.count - first));
  const int warp = static_cast<int>(threadIdx.x / kWarpThreads);
  const int section_size = strata.count / kSections;

  for (int i = threadIdx.x; i < search.codes.words() * kQueries; i += kBlockThreads)
    query_words[i] = i % kQueries < queries ? search.queries.word(first + i % kQueries, i / kQueries) : 0;
  for (int i = threadIdx.x; i < queries * bins; i += kBlockThreads) histograms[i] = 0;
  for (int i = threadIdx.x; i < queries * kSections; i += kBlockThreads) ties[i / kSections][i % kSections] = 0;
  for (int i = threadIdx.x; i < queries * Candidates::kMargins; i += kBlockThreads)
    candidates.margin_counts[first * Candidates::kMargins + i] = 0;
  if constexpr (kStoresDistances)
    for (int i = threadIdx.x; i < strata.count; i += kBlockThreads) stored[i] = kFilteredOut;
  __syncthreads();
  visit_sample<kQueries>(search, strata, first, queries, query_words, [&](int q, int sample, int distance) {
    atomicAdd(&histograms[q * bins + distance], 1u);
    if constexpr (kStoresDistances) stored[sample] = static_cast<uint16_t>(distance);
  });
  __syncthreads();
  // Warp q finds the distance of query q's bound.
  RankedBin ranked{};
  if (warp < queries) {
    ranked = find_bin(histograms + warp * bins, bins, rank);
    if (threadIdx.x % kWarpThreads == 0) distances[warp] = ranked.index;
  }
  __syncthreads();
  if constexpr (kStoresDistances) {
    for (int i = threadIdx.x; i < strata.count; i += kBlockThreads)
      if (stored[i] == distances[0]) atomicAdd(&ties[0][i / section_size], 1u);
  } else {
    visit_sample<kQueries>(search, strata, first, queries, query_words, [&](int q, int sample, int distance) {
      if (distance == distances[q]) atomicAdd(&ties[q][sample / section_size], 1u);
    });
  }
  __syncthreads();
  if (warp >= queries) return;

  // Warp q finds the position of query q's bound.
  const int64_t query = first + warp;
  // If fewer than `rank` sampled codes pass the filter, the bound admits every code.
  uint64_t bound = candidates.format.key(search.bits(), search.codes.count - 1);
  if (ranked.index < bins) {
    const RankedBin section = find_bin(ties[warp], kSections, ranked.rank);
    const int bound_sample = find_tie(section.index, section_size, section.rank, [&](int sample) {
      if constexpr (kStoresDistances) {
        return stored[sample] == ranked.index;
      } else {
        const int64_t position = strata.position(sample);
        return search.passes_filter(query, position) && search.distance(query, position) == ranked.index;
      }
    });
    bound = candidates.format.key(ranked.index, strata.position(bound_sample));
  }
  if (threadIdx.x % kWarpThreads == 0) {
    candidates.bounds[query] = bound;
    candidates.counts[query] = 0;
  }
}

}  // namespace

void launch_hamming_bounds(const HammingSearch& search, const HammingSample& sample, const Candidates& candidates,
                           cudaStream_t stream) {
  const int64_t bins = search.distance_count();
  const int64_t max_queries = std::min<int64_t>(kMaxQueriesPerBlock, HammingSample::kMaxBins / bins);
  const int64_t queries_per_sm = ceil_div(search.query_count, device_attribute(cudaDevAttrMultiProcessorCount));
  const int64_t queries_per_block = std::clamp<int64_t>(queries_per_sm, 1, max_queries);
  const int64_t unrolled_queries = queries_per_block == 1 ? 1 : kMaxQueriesPerBlock;
  const int64_t words = ceil_div<int64_t>(search.code_bytes, 4);
  const LaunchShape shape{ceil_div(search.query_count, queries_per_block), kBlockThreads,
                          (words * unrolled_queries + queries_per_block * bins) * int64_t{sizeof(uint32_t)} +
                              (unrolled_queries == 1 ? sample.count * int64_t{sizeof(uint16_t)} : 0)};
  launch(unrolled_queries == 1 ? bounds_kernel<1> : bounds_kernel<kMaxQueriesPerBlock>, shape, stream,
         DeviceSearch(search), Strata(sample.count, search.code_count), sample.rank, candidates,
         static_cast<int>(queries_per_block));
}

}  // namespace hashengine
