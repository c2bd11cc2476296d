// Estimates a bound for each query of hamming_topk from a sample of the database.
//
// Idea. The sample is stratified: the database is divided into equal parts (strata), and each gives one code to the
// sample. A hash chooses the position within the stratum, so that neither a sorted nor a periodic database biases the
// sample. The bound is the key of the sampled code that has a given rank in the order (distance, position). A histogram
// of the sampled distances gives the bound's distance. Several sampled codes may have that distance; these are the
// ties. A bitmap of the ties gives the bound's position.
//
// With more queries than multiprocessors, a first kernel stores the sampled codes one after another. A block of the
// second kernel then compares them with two, four or eight queries. It divides the sample into up to eight sections and
// keeps a histogram per query and section. The histograms tell which section contains a query's bound. Only the
// distances to this section are computed a second time, for the bitmap. With fewer queries, a block has one query and
// reads the codes from the database. It keeps all distances in shared memory.
//
// Traffic. The first kernel reads about one 32-byte sector per code of up to 256 bits. A block of the second kernel
// reads the stored sample and one section per query, from L1 or L2. For 8,192 codes of 64 bits that is 64 KB plus 8 KB
// per query. A block with a single query is limited by memory latency. Therefore it has eight loads per thread in
// flight.
//
// Instructions (nvcc 13.0, sm_90a), for codes of 64 bits and eight queries per block. A warp counts 128 codes x 8
// distances with 367 instructions: 64 population counts, 96 other instructions per pair of words for the distances, 32
// atomics in shared memory, and the preparation of the counters' addresses. It computes the bitmap of 128 codes with
// 132 instructions. For eight sections that is (367 + 132) / 1,024 = 0.49 instructions per distance. Clearing and
// searching the histograms come on top.
//
// Launch. One query per block: 512 threads and at most two blocks per multiprocessor. Otherwise 256 threads and at most
// three. The number of queries per block is the number of queries per multiprocessor, rounded up to a power of two and
// at most eight. It is smaller if the histograms of so many queries would take more than kMaxHistogramBytes. The number
// of sections is the largest power of two up to eight for which three blocks fit in the shared memory of a
// multiprocessor.
//
// Limits. Fewer than 2^32 codes, each of fewer than HammingSample::kMaxBins bits.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/workspace.h"
#include "cuda/hamming/topk_steps.h"

namespace hashengine {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kWarps = kBlockThreads / kWarpThreads;
// For __launch_bounds__. A lane computes 32 distances at a time and needs more than 64 registers.
constexpr int kBlocksPerSm = 3;
constexpr int kOneQueryThreads = 512;  // per block with one query
constexpr int kStoreThreads = 256;     // per block of store_sample_kernel
constexpr int kMaxQueriesPerBlock = 8;
constexpr int kMaxSectionsLog2 = 3;
static_assert(1 << kMaxSectionsLog2 == kWarps);   // a warp counts the codes of one section
constexpr int64_t kMaxHistogramBytes = 40 << 10;  // of a block and section: eight queries of up to 1,279 bits
constexpr int kLaneCodes = 4;                     // the sampled codes that a lane compares at a time
constexpr int kStepCodes = kLaneCodes * kWarpThreads;

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

// --- searching in counts ---------------------------------------------------------------------------------------------

// The bin of a histogram that contains the element of a given rank.
struct RankedBin {
  int index;     // the index of the bin, or the number of bins if the histogram has too few elements
  int64_t rank;  // the element's rank within the bin, counted from 1
};

// Finds the bin at which the running sum of count_of(0), count_of(1), ... reaches `rank`. The whole warp must call.
template <typename CountOf>
__device__ __forceinline__ RankedBin find_bin(int bins, int64_t rank, CountOf count_of) {
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads);
  for (int first = 0; first < bins; first += kWarpThreads) {
    const unsigned own = first + lane < bins ? count_of(first + lane) : 0;
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
  return {bins, rank};
}

// Returns the index of the `rank`-th set bit, counted from 1, of a bitmap. The whole warp must call.
__device__ __forceinline__ int find_bit(const unsigned* bitmap, int words, int64_t rank) {
  RankedBin word = find_bin(words, rank, [&](int i) { return static_cast<unsigned>(__popc(bitmap[i])); });
  unsigned bits = bitmap[word.index];
  for (; word.rank > 1; --word.rank) bits &= bits - 1;
  return word.index * 32 + __ffs(static_cast<int>(bits)) - 1;
}

// Stores the result of a query. `bound` is the key of a sampled code.
__device__ __forceinline__ void store_bound(const Candidates& candidates, int64_t query, uint64_t bound) {
  if (threadIdx.x % kWarpThreads != 0) return;
  candidates.bounds[query] = bound;
  candidates.counts[query] = 0;
}

// The bound if fewer than `rank` sampled codes pass the filter. If the filter is shared, it admits every code.
__device__ __forceinline__ uint64_t bound_of_few_codes(const DeviceSearch& search, const Candidates& candidates) {
  return search.filter_stride != 0 ? Candidates::kSelective
                                   : candidates.format.key(search.bits(), search.codes.count - 1);
}

// --- several queries per block ---------------------------------------------------------------------------------------

// The sampled codes, in the workspace. A code has an even number of words, of which the last may be zero.
struct StoredSample {
  static constexpr uint32_t kExcluded = ~0u;

  int count, code_words;
  uint32_t* words;      // [code_words, count]
  uint32_t* positions;  // [count]; kExcluded for codes that a filter excludes for all queries

  StoredSample(int64_t sample_count, int64_t code_bytes, Workspace& workspace)
      : count(static_cast<int>(sample_count)),
        code_words(2 * static_cast<int>(ceil_div<int64_t>(code_bytes, 8))),
        words(workspace.take<uint32_t>(sample_count * code_words)),
        positions(workspace.take<uint32_t>(sample_count)) {}
};

// The sections of a stored sample, which have 2^log2 histograms per query. A section has steps * kStepCodes sampled
// codes; the last sections may have fewer.
struct Sections {
  int log2, steps;

  HE_HOST_DEVICE int count() const { return 1 << log2; }
  HE_HOST_DEVICE int bitmap_words() const { return steps * kStepCodes / 32; }
  // The counters of a block's histograms, and one for the pairs that a filter excludes.
  HE_HOST_DEVICE int counters(int queries, int bins) const { return (queries * bins << log2) + 1; }
};

__global__ void __launch_bounds__(kStoreThreads)
    store_sample_kernel(DeviceSearch search, Strata strata, StoredSample sample) {
  wait_for_previous_kernel();  // lets the next kernel start early; does not wait, because this launch is not
                               // programmatic
  const int i = static_cast<int>(blockIdx.x) * kStoreThreads + static_cast<int>(threadIdx.x);
  const int index = i / sample.code_words, word = i % sample.code_words;
  if (index >= strata.count) return;
  const int64_t position = strata.position(index);
  sample.words[word * strata.count + index] = word < search.codes.words() ? search.codes.word(position, word) : 0;
  if (word != 0) return;
  const bool is_excluded = search.filter_stride == 0 && !search.passes_filter(0, position);
  sample.positions[index] = is_excluded ? StoredSample::kExcluded : static_cast<uint32_t>(position);
}

// Whether a query of the block can find the sampled code at `position`, which comes from StoredSample::positions.
__device__ __forceinline__ bool can_find(const DeviceSearch& search, int64_t query, uint32_t position) {
  if (position == StoredSample::kExcluded) return false;
  return search.filter_stride == 0 || search.passes_filter(query, position);
}

// Bit c * kQueries + q of the result is zero if query first_query + q cannot find the sampled code first + c.
template <int kQueries>
__device__ __forceinline__ uint32_t findable_pairs(const DeviceSearch& search, const StoredSample& sample,
                                                   int64_t first_query, int first) {
  static_assert(kLaneCodes * kQueries <= 32);
  const auto positions = vector_at<kLaneCodes>(sample.positions, first);
  uint32_t pairs = ~0u;
#pragma unroll 1
  for (int q = 0; q < kQueries; ++q)
#pragma unroll
    for (int c = 0; c < kLaneCodes; ++c)
      if (!can_find(search, min(first_query + q, search.queries.count - 1), positions.at[c]))
        pairs &= ~(1u << (c * kQueries + q));
  return pairs;
}

// Counts the distances between the block's queries and the sampled codes, per section. `counters` is zero before. It
// has the histograms, [sections, kQueries, bins], and then one counter for the pairs that a filter excludes.
template <int kQueries>
__device__ __forceinline__ void count_distances(const DeviceSearch& search, const StoredSample& sample,
                                                int64_t first_query, const uint32_t* query_words,
                                                const Sections& sections, unsigned* counters) {
  constexpr int kPairs = kLaneCodes * kQueries, kWidth = kQueries < 4 ? kQueries : 4;
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads), warp = static_cast<int>(threadIdx.x / kWarpThreads);
  const int bins = search.bits() + 1, section = warp & (sections.count() - 1);
  const int end = min((section + 1) * sections.steps * kStepCodes, sample.count);
  for (int first = (section * sections.steps + (warp >> sections.log2)) * kStepCodes + kLaneCodes * lane; first < end;
       first += kWarps * kStepCodes >> sections.log2) {
    const uint32_t findable =
        search.filter == nullptr ? ~0u : findable_pairs<kQueries>(search, sample, first_query, first);
    // The index of the counter of code first + i / kQueries and query first_query + i % kQueries.
    int indices[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) indices[i] = (section * kQueries + i % kQueries) * bins;
#pragma unroll 1
    for (int word = 0; word < sample.code_words; word += 2) {
      const auto low = vector_at<kLaneCodes>(sample.words, word * sample.count + first);
      const auto high = vector_at<kLaneCodes>(sample.words, (word + 1) * sample.count + first);
#pragma unroll
      for (int q = 0; q < kQueries; q += kWidth) {
        const auto query_low = vector_at<kWidth>(query_words, word * kQueries + q);
        const auto query_high = vector_at<kWidth>(query_words, (word + 1) * kQueries + q);
#pragma unroll
        for (int c = 0; c < kLaneCodes; ++c)
#pragma unroll
          for (int i = 0; i < kWidth; ++i)
            indices[c * kQueries + q + i] +=
                __popc(low.at[c] ^ query_low.at[i]) + __popc(high.at[c] ^ query_high.at[i]);
      }
    }
    if (findable != ~0u) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        if (!(findable >> i & 1)) indices[i] = sections.count() * kQueries * bins;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) atomicAdd(counters + indices[i], 1u);
  }
}

// Stores the ties among kStepCodes sampled codes, of which the first is number `first`: one bit per code. The words of
// the query are `stride` apart.
__device__ __forceinline__ void store_ties(const DeviceSearch& search, const StoredSample& sample, int64_t query,
                                           const uint32_t* query_words, int stride, int bound_distance, int first,
                                           unsigned* ties) {
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads);
  int distances[kLaneCodes] = {}, at[kLaneCodes];
#pragma unroll
  for (int c = 0; c < kLaneCodes; ++c) at[c] = min(first + c * kWarpThreads + lane, sample.count - 1);
  const uint32_t* from = sample.words;
  for (int word = 0; word < sample.code_words; ++word, from += sample.count, query_words += stride) {
#pragma unroll
    for (int c = 0; c < kLaneCodes; ++c) distances[c] += __popc(from[at[c]] ^ *query_words);
  }
#pragma unroll
  for (int c = 0; c < kLaneCodes; ++c) {
    bool is_tie = distances[c] == bound_distance && first + c * kWarpThreads + lane < sample.count;
    if (is_tie && search.filter != nullptr) is_tie = can_find(search, query, sample.positions[at[c]]);
    const unsigned bits = __ballot_sync(kWholeWarp, is_tie);
    if (lane == c) ties[c] = bits;
  }
}

template <int kQueries>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerSm)
    bounds_kernel(DeviceSearch search, StoredSample sample, int64_t rank, Candidates candidates, Sections sections) {
  constexpr int kNoTies = -1;
  __shared__ int bound_distances[kQueries], section_begins[kQueries];
  const int words = sample.code_words, bins = search.bits() + 1;
  auto* const query_words = dynamic_shared<uint32_t>();         // [words, kQueries]
  unsigned* const histograms = query_words + words * kQueries;  // [sections, kQueries, bins]
  const int counters = sections.counters(kQueries, bins);
  unsigned* const ties = histograms + counters;  // [kQueries, sections.bitmap_words()]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kQueries;
  const int queries = static_cast<int>(min(int64_t{kQueries}, search.queries.count - first));
  const int warp = static_cast<int>(threadIdx.x / kWarpThreads);
  for (int i = threadIdx.x; i < counters; i += kBlockThreads) histograms[i] = 0;
  wait_for_previous_kernel();

  // If fewer than kQueries queries are left, copies of the last one fill the other places.
  for (int i = threadIdx.x; i < words * kQueries; i += kBlockThreads) {
    const int64_t query = min(first + i % kQueries, search.queries.count - 1);
    query_words[i] = i / kQueries < search.queries.words() ? search.queries.word(query, i / kQueries) : 0;
  }
  for (int i = threadIdx.x; i < queries * Candidates::kMargins; i += kBlockThreads)
    candidates.margin_counts[first * Candidates::kMargins + i] = 0;
  __syncthreads();
  count_distances<kQueries>(search, sample, first, query_words, sections, histograms);
  __syncthreads();
  // Warp q finds the distance and the section of query q's bound.
  RankedBin ranked{};
  if (warp < queries) {
    const auto count_in = [&](int section, int bin) { return histograms[(section * kQueries + warp) * bins + bin]; };
    ranked = find_bin(bins, rank, [&](int bin) {
      unsigned count = 0;
      for (int section = 0; section < sections.count(); ++section) count += count_in(section, bin);
      return count;
    });
    const int distance = ranked.index;
    if (distance < bins) ranked = find_bin(sections.count(), ranked.rank, [&](int i) { return count_in(i, distance); });
    if (threadIdx.x % kWarpThreads == 0) {
      bound_distances[warp] = distance < bins ? distance : kNoTies;
      section_begins[warp] = ranked.index * sections.steps * kStepCodes;
    }
  }
  __syncthreads();
  const int q = warp % kQueries;
  if (q < queries && bound_distances[q] != kNoTies) {
#pragma unroll 1
    for (int step = warp / kQueries; step < sections.steps; step += kWarps / kQueries)
      store_ties(search, sample, first + q, query_words + q, kQueries, bound_distances[q],
                 section_begins[q] + step * kStepCodes, ties + q * sections.bitmap_words() + step * kLaneCodes);
  }
  __syncthreads();
  if (warp >= queries) return;

  // Warp q finds the position of query q's bound.
  uint64_t bound = bound_of_few_codes(search, candidates);
  if (bound_distances[warp] != kNoTies) {
    const int index =
        section_begins[warp] + find_bit(ties + warp * sections.bitmap_words(), sections.bitmap_words(), ranked.rank);
    bound = candidates.format.key(bound_distances[warp], sample.positions[index]);
  }
  store_bound(candidates, first + warp, bound);
}

// --- one query per block ---------------------------------------------------------------------------------------------

// Stores the distance of each sampled code, or kFilteredOut, and counts the distances. Most sampled codes are in
// different cache lines. Therefore a thread processes several codes at a time, which keeps several loads in flight.
constexpr uint16_t kFilteredOut = 0xffff;

__device__ __forceinline__ void store_distances(const DeviceSearch& search, const Strata& strata, int64_t query,
                                                const uint32_t* query_words, unsigned* histogram, uint16_t* stored) {
  constexpr int kCodes = 8;
  for (int first = threadIdx.x; first < strata.count; first += kCodes * kOneQueryThreads) {
    int64_t positions[kCodes];
    int distances[kCodes] = {};
#pragma unroll
    for (int c = 0; c < kCodes; ++c)
      positions[c] = strata.position(min(first + c * kOneQueryThreads, strata.count - 1));
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
      for (int c = 0; c < kCodes; ++c) distances[c] += __popc(codes[c] ^ query_words[word]);
    }
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int index = first + c * kOneQueryThreads;
      if (index >= strata.count) break;
      const bool passes = search.passes_filter(query, positions[c]);
      stored[index] = passes ? static_cast<uint16_t>(distances[c]) : kFilteredOut;
      if (passes) atomicAdd(histogram + distances[c], 1u);
    }
  }
}

__global__ void __launch_bounds__(kOneQueryThreads, 2)
    one_bound_kernel(DeviceSearch search, Strata strata, int64_t rank, Candidates candidates) {
  __shared__ int bound_distance;
  const int words = search.codes.words(), bins = search.bits() + 1;
  auto* const query_words = dynamic_shared<uint32_t>();
  unsigned* const histogram = query_words + words;                             // [bins]
  unsigned* const ties = histogram + bins;                                     // a bitmap of the sample
  auto* const stored = reinterpret_cast<uint16_t*>(ties + strata.count / 32);  // [strata.count]
  wait_for_previous_kernel();  // lets the scan start early; does not wait, because this launch is not programmatic
  const int64_t query = blockIdx.x;
  const int warp = static_cast<int>(threadIdx.x / kWarpThreads);

  for (int i = threadIdx.x; i < words; i += kOneQueryThreads) query_words[i] = search.queries.word(query, i);
  for (int i = threadIdx.x; i < bins; i += kOneQueryThreads) histogram[i] = 0;
  if (threadIdx.x < Candidates::kMargins) candidates.margin_counts[query * Candidates::kMargins + threadIdx.x] = 0;
  __syncthreads();
  store_distances(search, strata, query, query_words, histogram, stored);
  __syncthreads();
  RankedBin ranked{};
  if (warp == 0) {
    ranked = find_bin(bins, rank, [&](int bin) { return histogram[bin]; });
    if (threadIdx.x == 0) bound_distance = ranked.index;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < strata.count; i += kOneQueryThreads) {  // strata.count is a multiple of kWarpThreads
    const unsigned bits = __ballot_sync(kWholeWarp, stored[i] == bound_distance);
    if (i % kWarpThreads == 0) ties[i / kWarpThreads] = bits;
  }
  __syncthreads();
  if (warp != 0) return;
  uint64_t bound = bound_of_few_codes(search, candidates);
  if (ranked.index < bins)
    bound = candidates.format.key(ranked.index, strata.position(find_bit(ties, strata.count / 32, ranked.rank)));
  store_bound(candidates, query, bound);
}

// --- launches --------------------------------------------------------------------------------------------------------

void launch_one_query_per_block(const HammingSearch& search, const HammingSample& sample, const Candidates& candidates,
                                cudaStream_t stream) {
  const int64_t words = ceil_div<int64_t>(search.code_bytes, 4);
  const LaunchShape shape{search.query_count, kOneQueryThreads,
                          (words + search.distance_count() + sample.count / 32) * int64_t{sizeof(uint32_t)} +
                              sample.count * int64_t{sizeof(uint16_t)}};
  launch(one_bound_kernel, shape, stream, DeviceSearch(search), Strata(sample.count, search.code_count), sample.rank,
         candidates);
}

template <int kQueries>
void launch_several_queries_per_block(const HammingSearch& search, const HammingSample& sample,
                                      const Candidates& candidates, void* workspace, cudaStream_t stream) {
  Workspace arrays(workspace);
  const StoredSample stored(sample.count, search.code_bytes, arrays);
  const int64_t all_words = sample.count * stored.code_words;
  launch(store_sample_kernel, ceil_div(all_words, int64_t{kStoreThreads}), kStoreThreads, stream, DeviceSearch(search),
         Strata(sample.count, search.code_count), stored);

  const auto sections_of = [&](int log2) {
    return Sections{log2, static_cast<int>(ceil_div<int64_t>(sample.count, int64_t{kStepCodes} << log2))};
  };
  const auto shared_bytes = [&](int log2) {
    const Sections sections = sections_of(log2);
    return (sections.counters(kQueries, static_cast<int>(search.distance_count())) +
            kQueries * (stored.code_words + sections.bitmap_words())) *
           int64_t{sizeof(uint32_t)};
  };
  constexpr int64_t kReservedBytes = 2 << 10;  // static memory, and the memory that the system takes per block
  const int64_t max_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) / kBlocksPerSm - kReservedBytes;
  int log2 = kMaxSectionsLog2;
  while (log2 > 0 && shared_bytes(log2) > max_bytes) --log2;
  const LaunchShape shape{ceil_div<int64_t>(search.query_count, kQueries), kBlockThreads, shared_bytes(log2), 1, true};
  launch(bounds_kernel<kQueries>, shape, stream, DeviceSearch(search), stored, sample.rank, candidates,
         sections_of(log2));
}

}  // namespace

int64_t HammingSample::workspace_bytes(int64_t code_bytes) const {
  Workspace measured(nullptr);
  StoredSample(count, code_bytes, measured);
  return measured.bytes();
}

void launch_hamming_bounds(const HammingSearch& search, const HammingSample& sample, const Candidates& candidates,
                           void* workspace, cudaStream_t stream) {
  const int64_t histogram_bytes = search.distance_count() * int64_t{sizeof(unsigned)};
  const int64_t queries_per_sm = ceil_div(search.query_count, device_attribute(cudaDevAttrMultiProcessorCount));
  int queries = 1;
  while (queries < std::min<int64_t>(queries_per_sm, kMaxQueriesPerBlock) &&
         2 * queries * histogram_bytes <= kMaxHistogramBytes)
    queries *= 2;
  switch (queries) {
    case 1: return launch_one_query_per_block(search, sample, candidates, stream);
    case 2: return launch_several_queries_per_block<2>(search, sample, candidates, workspace, stream);
    case 4: return launch_several_queries_per_block<4>(search, sample, candidates, workspace, stream);
    default: return launch_several_queries_per_block<8>(search, sample, candidates, workspace, stream);
  }
}

}  // namespace hashengine
