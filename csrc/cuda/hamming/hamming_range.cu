// hamming_range on the GPU, and hamming_topk for the searches that can_launch_hamming_topk does not accept. A query's
// ranking has all codes within a radius, or the k nearest codes, ordered by (distance, position).
//
// Idea. Distances have few values, so a stable counting sort computes the rankings. The database is divided into
// segments. launch_hamming_ranking_count counts, per query, the codes of each segment at each distance. It computes
// prefix sums of these counts, first over the segments of each distance and then over the distances. They give the slot
// at which each segment's codes of each distance begin in the ranking. launch_hamming_ranking_place stores the results.
// A warp reads a segment in order, 32 codes at a time. Lanes with equal distances find each other with
// __match_any_sync, and a lane's rank among them determines its slot. No two results are compared, and the order does
// not depend on timing.
//
// Traffic, for N codes of B bytes and R results of one query. The codes are read twice, N * B bytes each time, and 12 R
// bytes of results are written. The floor is one read of the codes, but the slots of the results are not known before
// the end of the first read. During the second read, a warp skips a segment that has no result for its query, if the
// slots are in shared memory. Therefore a small radius takes hardly more than one read. If 32 codes are all farther
// than the farthest result that the segment may have, the warp computes only their distances. Storing, summing and
// reading the counts moves 40 more bytes per query, segment and distance. With many queries the population counts are
// the bottleneck, as in hamming_count.cu. If all codes are results, the matching and the scattered stores are the
// bottleneck (estimated).
//
// Launch. Counting: 256 threads per block; each block has one segment and up to eight queries. Prefix sums: one warp
// per query and distance, then one warp per query. Placing: four warps per block; each warp has one query and one
// segment. Adjacent warps have the same segment, whose codes they read from the caches. For hamming_topk, a last kernel
// fills the slots without a result.
//
// Limits. A segment has 1,024 codes, or the next power of two with which all queries of a batch together have at most
// kEnoughSegments segments and the counts fit in kMaxWorkspaceBytes. At the most, a segment is the whole database.
// Counts for more than 9,216 distances, and slots for more than 1,152 distances, are in global memory.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/workspace.h"
#include "cuda/hamming/distances.cuh"
#include "hashengine/hamming_cuda.h"

namespace hashengine {
namespace {

constexpr int64_t kMaxWorkspaceBytes = int64_t(256) << 20;
constexpr int64_t kMinSegmentCodes = 1024;
constexpr int64_t kBatchSegmentCodes = 8192;   // the segment length that hamming_ranking_batch assumes
constexpr int64_t kEnoughSegments = 1 << 15;   // of all queries: more than the warps that a current GPU runs at a time
constexpr int kSumWarps = 8, kPlaceWarps = 4;  // per block
constexpr int kPlaceBlocksPerSm = 8;
constexpr int kFillThreads = 256;
constexpr int64_t kFillSlots = 1 << 15;  // slots per block of fill_kernel

// The histogram of each query and segment, in the workspace. The prefix sums replace the counts, and give the offsets.
struct SegmentHistograms {
  int64_t queries, segments, segment_codes;
  int distances;  // the number of distances, which are 0 to the radius
  // [queries, distances, segments + 1]: the number of the segment's codes that have the distance. After the prefix
  // sums, the number of such codes in all segments before it.
  Count* counts;
  // [queries, distances + 1]: the slot at which the codes of each distance begin. The last entry is the number of codes
  // within the radius that pass the filter.
  Count* offsets;

  SegmentHistograms(const HammingRanking& ranking, int64_t codes_per_segment)
      : queries(ranking.search.query_count),
        segments(std::max<int64_t>(ceil_div(ranking.search.code_count, codes_per_segment), 1)),
        segment_codes(codes_per_segment),
        distances(static_cast<int>(ranking.radius) + 1),
        counts(nullptr),
        offsets(nullptr) {}

  int64_t counter_count() const { return queries * distances * (segments + 1); }

  void take_arrays(Workspace& workspace) {
    counts = workspace.take<Count>(counter_count());
    offsets = workspace.take<Count>(queries * (distances + 1));
  }

  int64_t bytes() const {
    Workspace measured(nullptr);
    SegmentHistograms(*this).take_arrays(measured);
    return measured.bytes();
  }

  // The counts of a query and distance, one per segment.
  HE_HOST_DEVICE Count* row(int64_t query, int64_t distance) const {
    return counts + (query * distances + distance) * (segments + 1);
  }
};

// Returns the histograms of the shortest segments that the limits at the top of this file permit, without arrays.
SegmentHistograms plan_histograms(const HammingRanking& ranking) {
  SegmentHistograms histograms(ranking, kMinSegmentCodes);
  while (histograms.segments > 1 &&
         (histograms.queries * histograms.segments > kEnoughSegments || histograms.bytes() > kMaxWorkspaceBytes))
    histograms = SegmentHistograms(ranking, 2 * histograms.segment_codes);
  return histograms;
}

// The same histograms, with their arrays in the workspace.
SegmentHistograms plan_histograms(const HammingRanking& ranking, void* workspace) {
  SegmentHistograms histograms = plan_histograms(ranking);
  Workspace arrays(workspace);
  histograms.take_arrays(arrays);
  return histograms;
}

// --- counting --------------------------------------------------------------------------------------------------------

template <int kQueries>
__global__ void __launch_bounds__(kCountThreads, kCountBlocksPerSm)
    count_kernel(DeviceSearch search, SegmentHistograms histograms, int64_t query_groups, bool counts_in_shared) {
  const int64_t segment = blockIdx.x / query_groups;
  const int64_t first_query = (blockIdx.x - segment * query_groups) * kQueries;
  const int64_t begin = segment * histograms.segment_codes;
  const int64_t end = min(begin + histograms.segment_codes, search.codes.count);
  const int distances = histograms.distances;

  const StagedQueries<kQueries> queries(search, first_query, dynamic_shared<uint32_t>());
  if (!counts_in_shared) {
    __syncthreads();
    queries.for_each_distance(begin, end, [&](int q, int64_t, int distance) {
      if (distance < distances) atomicAdd(histograms.row(first_query + q, distance) + segment, Count{1});
    });
    return;
  }
  // [query][distance]
  unsigned* const counters = dynamic_shared<unsigned>() + queries.bytes(search.codes.bytes) / sizeof(unsigned);
  for (int i = threadIdx.x; i < kQueries * distances; i += kCountThreads) counters[i] = 0;
  __syncthreads();
  queries.for_each_distance(begin, end, [&](int q, int64_t, int distance) {
    if (distance < distances) atomicAdd(counters + q * distances + distance, 1u);
  });
  __syncthreads();
  const int rows = static_cast<int>(min(int64_t{kQueries}, histograms.queries - first_query)) * distances;
  // The rows of consecutive queries are contiguous, so row(first_query, i) runs over all of them.
  for (int i = threadIdx.x; i < rows; i += kCountThreads) histograms.row(first_query, i)[segment] = counters[i];
}

// --- prefix sums -----------------------------------------------------------------------------------------------------

// Sets sums[i] to the sum of the first i values, for i from 0 to `count`. Value i is values[i * stride]. `sums` may be
// `values` if the stride is 1. Returns the sum of all values. The whole warp must call.
__device__ __forceinline__ Count prefix_sum(const Count* values, int64_t stride, int64_t count, Count* sums) {
  constexpr int kLoads = 4;  // loads in flight per lane
  const int lane = threadIdx.x % kWarpThreads;
  Count before = 0;
  for (int64_t first = 0; first < count; first += kLoads * kWarpThreads) {
    Count own[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t at = first + i * kWarpThreads + lane;
      own[i] = at < count ? values[at * stride] : 0;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i * kWarpThreads >= count) break;
      Count with_own = own[i];
#pragma unroll
      for (int distance = 1; distance < kWarpThreads; distance *= 2) {
        const Count left = __shfl_up_sync(kWholeWarp, with_own, distance);
        if (lane >= distance) with_own += left;
      }
      const int64_t at = first + i * kWarpThreads + lane;
      if (at < count) sums[at] = before + with_own - own[i];
      before += __shfl_sync(kWholeWarp, with_own, kWarpThreads - 1);
    }
  }
  if (lane == 0) sums[count] = before;
  return before;
}

__global__ void __launch_bounds__(kSumWarps* kWarpThreads) sum_segments_kernel(SegmentHistograms histograms) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSumWarps + threadIdx.x / kWarpThreads;
  if (row >= histograms.queries * histograms.distances) return;  // all lanes of the warp return
  Count* const counts = histograms.row(0, row);
  prefix_sum(counts, 1, histograms.segments, counts);
}

__global__ void __launch_bounds__(kSumWarps* kWarpThreads)
    sum_distances_kernel(SegmentHistograms histograms, int64_t max_results, int64_t* totals) {
  const int64_t query = static_cast<int64_t>(blockIdx.x) * kSumWarps + threadIdx.x / kWarpThreads;
  if (query >= histograms.queries) return;  // all lanes of the warp return
  const Count found = prefix_sum(histograms.row(query, 0) + histograms.segments, histograms.segments + 1,
                                 histograms.distances, histograms.offsets + query * (histograms.distances + 1));
  if (totals != nullptr && threadIdx.x % kWarpThreads == 0)
    totals[query] = min(static_cast<int64_t>(found), max_results);
}

// --- placing ---------------------------------------------------------------------------------------------------------

struct Results {
  int32_t* distances;
  int64_t* positions;
  int64_t max_results;
};

// For a warp's query and segment: the slot that the next code at each distance takes. The slots are in shared memory.
// If they do not fit there, they are in the workspace and replace the counts.
template <bool kInShared>
struct NextSlots {
  Count* slots;  // slots[d * stride] is the next slot at distance d
  int64_t stride;
  int max_distance;  // the largest distance at which the segment may have results; -1: it has no results

  __device__ __forceinline__ NextSlots(const SegmentHistograms& histograms, int64_t query, int64_t segment,
                                       int64_t max_results) {
    Count* const counts = histograms.row(query, 0) + segment;
    const Count* const offsets = histograms.offsets + query * (histograms.distances + 1);
    const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
    slots = kInShared ? dynamic_shared<Count>() + warp * histograms.distances : counts;
    stride = kInShared ? 1 : histograms.segments + 1;
    max_distance = -1;
    for (int distance = lane; distance < histograms.distances; distance += kWarpThreads) {
      const Count* const count = counts + distance * (histograms.segments + 1);
      const Count begin = offsets[distance] + count[0];
      // count[1] belongs to the next segment. If the slots are in the workspace, count[1] cannot be used, because the
      // warp of that segment may already have replaced it by a slot.
      const bool may_have_results = !kInShared || count[1] > count[0];
      if (may_have_results && begin < static_cast<Count>(max_results)) max_distance = distance;
      slots[distance * stride] = begin;
    }
#pragma unroll
    for (int step = kWarpThreads / 2; step > 0; step /= 2)
      max_distance = max(max_distance, __shfl_xor_sync(kWholeWarp, max_distance, step));
    __syncwarp();
  }

  // Returns the next slot at `distance` to each lane that passes `takes`, in the order of the lanes. Other lanes must
  // ignore the result. The whole warp must call.
  __device__ __forceinline__ Count take(bool takes, int distance) {
    const unsigned peers = __match_any_sync(kWholeWarp, takes ? distance : -1);
    const unsigned before = peers & ((1u << threadIdx.x % kWarpThreads) - 1);
    const Count next = takes ? slots[distance * stride] : 0;
    __syncwarp();  // no lane writes before all lanes have read
    if (takes && before == 0) slots[distance * stride] = next + __popc(peers);
    __syncwarp();  // makes the writes visible for the next 32 codes
    return next + __popc(before);
  }
};

template <bool kInShared>
__global__ void __launch_bounds__(kPlaceWarps* kWarpThreads, kPlaceBlocksPerSm)
    place_kernel(DeviceSearch search, SegmentHistograms histograms, const int64_t* lims, Results results) {
  constexpr int kCodes = kCodesPerStep<1>;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kPlaceWarps + threadIdx.x / kWarpThreads;
  const int64_t segment = warp / histograms.queries, query = warp - segment * histograms.queries;
  if (segment >= histograms.segments) return;  // all lanes of the warp return
  NextSlots<kInShared> next_slots(histograms, query, segment, results.max_results);
  if (next_slots.max_distance < 0) return;
  const int64_t first_result = lims != nullptr ? lims[query] : query * results.max_results;

  const auto query_word = [&](int i) { return Vector<uint32_t, 1>{{search.queries.word(query, i)}}; };
  const int64_t begin = segment * histograms.segment_codes + threadIdx.x % kWarpThreads;
  const int64_t end = min((segment + 1) * histograms.segment_codes, search.codes.count);
  for (int64_t position = begin; __any_sync(kWholeWarp, position < end); position += kCodes * kWarpThreads) {
    int distances[kCodes][1];
    compute_distances(search.codes, position, kWarpThreads, end, query_word, distances);
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int64_t at = position + c * kWarpThreads;
      const int distance = distances[c][0];
      const bool takes = at < end && distance <= next_slots.max_distance && search.passes_filter(query, at);
      if (!__any_sync(kWholeWarp, takes)) continue;
      const Count slot = next_slots.take(takes, distance);
      if (!takes || slot >= static_cast<Count>(results.max_results)) continue;
      results.distances[first_result + slot] = distance;
      results.positions[first_result + slot] = at;
    }
  }
}

// Writes distance `absent` and position -1 to the slots that have no result. A query has `parts` blocks.
__global__ void __launch_bounds__(kFillThreads)
    fill_kernel(SegmentHistograms histograms, int64_t parts, int absent, Results results) {
  const int64_t query = blockIdx.x / parts, part = blockIdx.x - query * parts;
  const int64_t found = histograms.offsets[query * (histograms.distances + 1) + histograms.distances];
  const int64_t end = min((part + 1) * kFillSlots, results.max_results);
  for (int64_t slot = max(part * kFillSlots, found) + threadIdx.x; slot < end; slot += kFillThreads) {
    results.distances[query * results.max_results + slot] = absent;
    results.positions[query * results.max_results + slot] = -1;
  }
}

}  // namespace

int64_t hamming_ranking_batch(const HammingRanking& ranking) {
  HammingRanking one_query = ranking;
  one_query.search.query_count = 1;
  SegmentHistograms histograms(one_query, kBatchSegmentCodes);
  while (histograms.segments > 1 && histograms.bytes() > kMaxWorkspaceBytes)
    histograms = SegmentHistograms(one_query, 2 * histograms.segment_codes);
  return std::max<int64_t>(kMaxWorkspaceBytes / histograms.bytes(), 1);
}

int64_t hamming_ranking_workspace_bytes(const HammingRanking& ranking) {
  const int64_t queries = ranking.search.query_count, batch = std::min(hamming_ranking_batch(ranking), queries);
  const auto bytes_for = [&](int64_t query_count) {
    HammingRanking part = ranking;
    part.search.query_count = query_count;
    return plan_histograms(part).bytes();
  };
  // A smaller last batch can need more bytes than the others, because it may have shorter segments.
  const int64_t last = batch > 0 ? queries % batch : 0;
  return std::max(bytes_for(batch), last > 0 ? bytes_for(last) : 0);
}

void launch_hamming_ranking_count(const HammingRanking& ranking, int64_t* totals, void* workspace,
                                  cudaStream_t stream) {
  if (ranking.search.query_count == 0) return;
  const SegmentHistograms histograms = plan_histograms(ranking, workspace);
  const int64_t counter_bytes = histograms.distances * static_cast<int64_t>(sizeof(unsigned));
  with_queries_per_block(histograms.queries, counter_bytes, [&](auto queries) {
    constexpr int kQueries = decltype(queries)::value;
    const int64_t groups = ceil_div<int64_t>(histograms.queries, kQueries);
    const bool in_shared = kQueries * counter_bytes <= kMaxCounterBytes;
    if (!in_shared) cudaMemsetAsync(histograms.counts, 0, histograms.counter_count() * sizeof(Count), stream);
    const LaunchShape shape = {
        groups * histograms.segments, kCountThreads,
        StagedQueries<kQueries>::bytes(ranking.search.code_bytes) + in_shared * kQueries * counter_bytes};
    launch(count_kernel<kQueries>, shape, stream, DeviceSearch(ranking.search), histograms, groups, in_shared);
  });
  launch(sum_segments_kernel, ceil_div<int64_t>(histograms.queries * histograms.distances, kSumWarps),
         kSumWarps * kWarpThreads, stream, histograms);
  launch(sum_distances_kernel, ceil_div<int64_t>(histograms.queries, kSumWarps), kSumWarps * kWarpThreads, stream,
         histograms, ranking.max_results, totals);
}

void launch_hamming_ranking_place(const HammingRanking& ranking, const int64_t* lims, int32_t* distances,
                                  int64_t* positions, void* workspace, cudaStream_t stream) {
  if (ranking.search.query_count == 0) return;
  const SegmentHistograms histograms = plan_histograms(ranking, workspace);
  const Results results = {distances, positions, ranking.max_results};
  const int64_t slot_bytes = kPlaceWarps * histograms.distances * static_cast<int64_t>(sizeof(Count));
  const bool in_shared = slot_bytes <= kMaxCounterBytes;
  const LaunchShape shape = {ceil_div<int64_t>(histograms.queries * histograms.segments, kPlaceWarps),
                             kPlaceWarps * kWarpThreads, in_shared ? slot_bytes : 0};
  launch(in_shared ? place_kernel<true> : place_kernel<false>, shape, stream, DeviceSearch(ranking.search), histograms,
         lims, results);
  if (lims != nullptr) return;
  const int64_t parts = ceil_div(ranking.max_results, kFillSlots);
  launch(fill_kernel, histograms.queries * parts, kFillThreads, stream, histograms, parts,
         static_cast<int>(ranking.search.distance_count()), results);
}

}  // namespace hashengine
