// hamming_range on the GPU, and hamming_topk for the searches that can_launch_hamming_topk does not accept. A ranking
// is the result for one query, all codes within a radius or the k nearest codes, ordered by (distance, position).
//
// Idea. Distances have few values, so a stable counting sort computes a ranking. The database is divided into segments.
// The first launch counts, per query, the codes of each segment at each distance, and computes prefix sums, first over
// the segments of each distance and then over the distances. The prefix sums give the slots at which each segment's
// codes of each distance begin in the result. In the second launch a warp reads a segment in order, 32 codes at a time:
// lanes with equal distances find each other with __match_any_sync, and a lane's rank among them determines its slot.
// No two results are compared, and the order does not depend on timing.
//
// Traffic, for N codes of B bytes and R results. The codes are read twice, N * B bytes each time, and 12 R bytes of
// results are written. The floor is one read of the codes, but the slots of the results are not known before the end of
// the first pass. In the second pass a warp skips a segment that has no result for its query, so a small radius takes
// hardly more than one pass. If 32 codes are all farther than the farthest result that the segment may have, the warp
// computes only their distances. To store, sum and read the counts moves 40 bytes more per query, segment and distance.
// With many queries the population counts are the bottleneck, as in hamming_count.cu. If all codes are results, the
// bottleneck is the matching and the scattered stores.
//
// Launch. Counting: 256 threads per block, one segment and up to eight queries. Prefix sums: one warp per query and
// distance, then one warp per query. Placing: four warps per block, each with one query and segment; adjacent warps
// have the same segment, whose codes they read from the caches. For hamming_topk, a last kernel fills the slots that no
// result takes.
//
// Limits. The number of codes per segment is a power of two, at least 1,024: the smallest with which all queries
// together have at most kEnoughSegments segments, whose counts fit in kMaxWorkspaceBytes. Counts for more than 9,216
// distances, and slots for more than 1,152 distances, are in global memory.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/workspace.h"
#include "cuda/hamming/distances.cuh"
#include "hashengine/hamming_cuda.h"

namespace hashengine {
namespace {

constexpr int64_t kMaxWorkspaceBytes = int64_t(256) << 20;
constexpr int64_t kMinSegmentCodes = 1024;
constexpr int64_t kBatchSegmentCodes = 8192;   // hamming_ranking_batch sizes batches for segments of this length
constexpr int64_t kEnoughSegments = 1 << 15;   // of all queries: more than the warps that any GPU runs at a time
constexpr int kSumWarps = 8, kPlaceWarps = 4;  // per block
constexpr int kPlaceBlocksPerSm = 8;
constexpr int kFillThreads = 256;
constexpr int64_t kFillSlots = 1 << 15;  // per block

// The histograms of the segments, in the workspace. The prefix sums turn counts into offsets.
struct SegmentHistograms {
  int64_t queries, segments, segment_codes;
  int distances;  // 0 to the radius
  // [query, distance, segments + 1]: the number of each segment's codes that have the distance; after the prefix sums,
  // the number in all segments before it.
  Count* counts;
  // [query, distances + 1]: the slot at which the codes of each distance begin; the last entry is the number of
  // results.
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

  HE_HOST_DEVICE Count* row(int64_t query, int64_t distance) const {
    return counts + (query * distances + distance) * (segments + 1);
  }
};

// Plans the shortest segments with which all queries together have at most kEnoughSegments segments, whose counts fit
// in kMaxWorkspaceBytes.
SegmentHistograms plan_histograms(const HammingRanking& ranking) {
  SegmentHistograms histograms(ranking, kMinSegmentCodes);
  while (histograms.segments > 1 &&
         (histograms.queries * histograms.segments > kEnoughSegments || histograms.bytes() > kMaxWorkspaceBytes))
    histograms = SegmentHistograms(ranking, 2 * histograms.segment_codes);
  return histograms;
}

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

// sums[i] is the sum of the first i values, for i from 0 to `count`; the values are `stride` apart. Works in place if
// the stride is 1. Returns the sum of all values. The whole warp must call.
__device__ __forceinline__ Count prefix_sum(const Count* values, int64_t stride, int64_t count, Count* sums) {
  constexpr int kLoads = 4;  // loads in flight at a time
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
  if (row >= histograms.queries * histograms.distances) return;  // the same in a whole warp
  Count* const counts = histograms.row(0, row);
  prefix_sum(counts, 1, histograms.segments, counts);
}

__global__ void __launch_bounds__(kSumWarps* kWarpThreads)
    sum_distances_kernel(SegmentHistograms histograms, int64_t max_results, int64_t* totals) {
  const int64_t query = static_cast<int64_t>(blockIdx.x) * kSumWarps + threadIdx.x / kWarpThreads;
  if (query >= histograms.queries) return;  // the same in a whole warp
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

// The slot of the next code at each distance, for the query and segment of a warp. The slots are in shared memory or,
// if they do not fit, in the workspace, where they replace the counts.
template <bool kInShared>
struct NextSlots {
  Count* slots;  // slots[d * stride] is the next slot at distance d
  int64_t stride;
  int max_distance;  // the largest distance at which the segment may have results; -1: it has none

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
      // In the workspace, the warp of the next segment may already have replaced count[1] by a slot.
      const bool may_have_results = !kInShared || count[1] > count[0];
      if (may_have_results && begin < static_cast<Count>(max_results)) max_distance = distance;
      slots[distance * stride] = begin;
    }
#pragma unroll
    for (int step = kWarpThreads / 2; step > 0; step /= 2)
      max_distance = max(max_distance, __shfl_xor_sync(kWholeWarp, max_distance, step));
    __syncwarp();
  }

  // Takes a slot at `distance` for each lane that calls with `takes`, in the order of the lanes. The whole warp must
  // call.
  __device__ __forceinline__ Count take(bool takes, int distance) {
    const unsigned peers = __match_any_sync(kWholeWarp, takes ? distance : -1);
    const unsigned before = peers & ((1u << threadIdx.x % kWarpThreads) - 1);
    const Count next = takes ? slots[distance * stride] : 0;
    __syncwarp();  // all lanes have read
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
  if (segment >= histograms.segments) return;  // the same in a whole warp
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

// Fills the slots that no result takes.
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
  HammingRanking one = ranking;
  one.search.query_count = 1;
  SegmentHistograms histograms(one, kBatchSegmentCodes);
  while (histograms.segments > 1 && histograms.bytes() > kMaxWorkspaceBytes)
    histograms = SegmentHistograms(one, 2 * histograms.segment_codes);
  return std::max<int64_t>(kMaxWorkspaceBytes / histograms.bytes(), 1);
}

int64_t hamming_ranking_workspace_bytes(const HammingRanking& ranking) { return plan_histograms(ranking).bytes(); }

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
