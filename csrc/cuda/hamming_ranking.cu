// Rankings by counting, on the GPU: all codes within a radius, or the k nearest for a large k, by (distance, position).
//
// Idea. A distance has few values, so a ranking is a stable counting sort. The database is cut in segments. The first
// launch counts, for each query, how many codes of each segment lie at each distance, and adds up: first over the
// segments of a distance, then over the distances. So it is known where each segment's codes of each distance begin. In
// the second launch a warp walks a segment in order, 32 codes at a time: lanes of one distance find each other by
// __match_any_sync, and each takes the place that its rank among them gives. No two results are compared, and the order
// does not depend on who comes first.
//
// Traffic, N codes of B bytes, Q queries, R results: the codes twice and 12 R. The floor is once: what the first pass
// finds has no place yet. A warp leaves a segment unread that holds nothing for its query, so that a small radius costs
// one pass; beyond the last distance that still has places, a vote of the warp passes over 32 codes. The counts add
// 40 bytes a query, segment and distance. Population counts bound many queries, as in hamming_count.cu; where all codes
// are results, matching and the scattered stores do.
//
// Launch. Counting: 256 threads, a segment and up to eight queries. Sums: a warp a query and distance, then a warp a
// query. Placing: four warps, a query and segment each; neighbouring warps have the same segment, whose codes come from
// the caches. Where all segments together have fewer results than places, the rest is filled.
//
// Limits. Segments have 1,024 codes or, where the counts would not fit in kWorkspaceBytes or there are warps enough, a
// larger power of two. Counts of more than 9,216 distances, and places of more than 1,152, are in global memory.

#include <algorithm>

#include "hamming_measure.cuh"
#include "hashengine/hamming_cuda.h"
#include "launch.cuh"

namespace hashengine {
namespace {

constexpr int64_t kWorkspaceBytes = int64_t(256) << 20;
constexpr int64_t kMinSegmentCodes = 1024;
constexpr int64_t kBatchSegmentCodes = 8192;   // short enough for any number of queries
constexpr int64_t kEnoughSegments = 1 << 15;   // over all queries: several waves of warps on any GPU
constexpr int kSumWarps = 8, kPlaceWarps = 4;  // a block
constexpr int kPlaceBlocks = 8;                // a multiprocessor
constexpr int kFillThreads = 256;
constexpr int64_t kFilledPlaces = 1 << 15;  // a block

// The workspace: how many codes of a segment lie at a distance, which the sums turn into how many of that distance lie
// before them.
struct Shares {
  int64_t queries, segments, segment_codes;
  int distances;  // 0 to the radius
  Count* counts;  // [query, distance, segments + 1]; the last is the sum over the segments
  Count* places;  // [query, distances + 1], where the codes of a distance begin; the last: the number of results

  Shares(const HammingRanking& ranking, int64_t segment_codes)
      : queries(ranking.search.query_count),
        segments(std::max<int64_t>(ceil_div(ranking.search.code_count, segment_codes), 1)),
        segment_codes(segment_codes),
        distances(static_cast<int>(ranking.radius) + 1),
        counts(nullptr),
        places(nullptr) {}

  int64_t counters() const { return queries * distances * (segments + 1); }
  int64_t bytes() const { return (counters() + queries * (distances + 1)) * static_cast<int64_t>(sizeof(Count)); }

  HE_HOST_DEVICE Count* row(int64_t query, int64_t distance) const {
    return counts + (query * distances + distance) * (segments + 1);
  }
};

// As short as there are segments enough, and as memory holds their counts.
Shares cut(const HammingRanking& ranking) {
  Shares shares(ranking, kMinSegmentCodes);
  while (shares.segments > 1 &&
         (shares.queries * shares.segments > kEnoughSegments || shares.bytes() > kWorkspaceBytes))
    shares = Shares(ranking, 2 * shares.segment_codes);
  return shares;
}

Shares cut(const HammingRanking& ranking, void* workspace) {
  Shares shares = cut(ranking);
  shares.counts = static_cast<Count*>(workspace);
  shares.places = shares.counts + shares.counters();
  return shares;
}

// --- counting --------------------------------------------------------------------------------------------------------

template <int kQueries>
__global__ void __launch_bounds__(kCountThreads, kCountBlocks)
    count_kernel(DeviceSearch search, Shares shares, int64_t query_groups, bool counts_in_shared) {
  const int64_t segment = blockIdx.x / query_groups;
  const int64_t first_query = (blockIdx.x - segment * query_groups) * kQueries;
  const int64_t begin = segment * shares.segment_codes;
  const int64_t end = min(begin + shares.segment_codes, search.codes.count);
  const int distances = shares.distances;

  const QueryBlock<kQueries> queries(search, first_query, dynamic_shared<uint32_t>());
  if (!counts_in_shared) {
    __syncthreads();
    queries.for_each_distance(begin, end, [&](int q, int64_t, int distance) {
      if (distance < distances) atomicAdd(shares.row(first_query + q, distance) + segment, Count{1});
    });
    return;
  }
  // [query, distance]
  unsigned* const counters = dynamic_shared<unsigned>() + queries.bytes(search.codes.bytes) / sizeof(unsigned);
  for (int i = threadIdx.x; i < kQueries * distances; i += kCountThreads) counters[i] = 0;
  __syncthreads();
  queries.for_each_distance(begin, end, [&](int q, int64_t, int distance) {
    if (distance < distances) atomicAdd(counters + q * distances + distance, 1u);
  });
  __syncthreads();
  const int rows = static_cast<int>(min(int64_t{kQueries}, shares.queries - first_query)) * distances;
  for (int i = threadIdx.x; i < rows; i += kCountThreads)
    shares.row(first_query, i)[segment] = counters[i];  // the next query's rows follow
}

// --- sums ------------------------------------------------------------------------------------------------------------

// A warp: sums[i] is the sum of the values before i, for i up to `count`, of values that lie `stride` apart. They may
// be the values themselves, stride 1. Returns the sum of all.
__device__ __forceinline__ Count sum_before(const Count* values, int64_t stride, int64_t count, Count* sums) {
  constexpr int kLoads = 4;  // under way at a time
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

__global__ void __launch_bounds__(kSumWarps* kWarpThreads) sum_segments_kernel(Shares shares) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSumWarps + threadIdx.x / kWarpThreads;
  if (row >= shares.queries * shares.distances) return;  // a whole warp
  Count* const counts = shares.row(0, row);
  sum_before(counts, 1, shares.segments, counts);
}

__global__ void __launch_bounds__(kSumWarps* kWarpThreads)
    sum_distances_kernel(Shares shares, int64_t most, int64_t* totals) {
  const int64_t query = static_cast<int64_t>(blockIdx.x) * kSumWarps + threadIdx.x / kWarpThreads;
  if (query >= shares.queries) return;  // a whole warp
  const Count found = sum_before(shares.row(query, 0) + shares.segments, shares.segments + 1, shares.distances,
                                 shares.places + query * (shares.distances + 1));
  if (totals != nullptr && threadIdx.x % kWarpThreads == 0) totals[query] = min(static_cast<int64_t>(found), most);
}

// --- placing ---------------------------------------------------------------------------------------------------------

// Where the results of a query go.
struct Results {
  int32_t* distances;
  int64_t* positions;
  int64_t most;
};

// The place that the next code of each distance takes, for a warp's query and segment: in shared memory, or, for long
// codes, in the workspace, where the counts are no longer needed.
template <bool kInShared>
struct NextPlaces {
  Count* at;
  int64_t stride;
  int farthest;  // the farthest distance at which the segment may have results; -1: it has none

  __device__ __forceinline__ NextPlaces(const Shares& shares, int64_t query, int64_t segment, int64_t most) {
    Count* const counts = shares.row(query, 0) + segment;
    const Count* const places = shares.places + query * (shares.distances + 1);
    const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
    at = kInShared ? dynamic_shared<Count>() + warp * shares.distances : counts;
    stride = kInShared ? 1 : shares.segments + 1;
    farthest = -1;
    for (int distance = lane; distance < shares.distances; distance += kWarpThreads) {
      const Count* const share = counts + distance * (shares.segments + 1);
      const Count begin = places[distance] + share[0];
      // In the workspace the next segment's count may be its warp's next place by now.
      const bool has_any = !kInShared || share[1] > share[0];
      if (has_any && begin < static_cast<Count>(most)) farthest = distance;
      at[distance * stride] = begin;
    }
#pragma unroll
    for (int step = kWarpThreads / 2; step > 0; step /= 2)
      farthest = max(farthest, __shfl_xor_sync(kWholeWarp, farthest, step));
    __syncwarp();
  }

  // A place for each lane that takes one, in the order of the lanes.
  __device__ __forceinline__ Count take(bool takes, int distance) {
    const unsigned peers = __match_any_sync(kWholeWarp, takes ? distance : -1);
    const unsigned before = peers & ((1u << threadIdx.x % kWarpThreads) - 1);
    const Count next = takes ? at[distance * stride] : 0;
    __syncwarp();  // all have read
    if (takes && before == 0) at[distance * stride] = next + __popc(peers);
    __syncwarp();  // the next 32 codes read what was written
    return next + __popc(before);
  }
};

template <bool kInShared>
__global__ void __launch_bounds__(kPlaceWarps* kWarpThreads, kPlaceBlocks)
    place_kernel(DeviceSearch search, Shares shares, const int64_t* lims, Results results) {
  constexpr int kCodes = kCodesAtOnce<1>;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kPlaceWarps + threadIdx.x / kWarpThreads;
  const int64_t segment = warp / shares.queries, query = warp - segment * shares.queries;
  if (segment >= shares.segments) return;  // a whole warp
  NextPlaces<kInShared> next(shares, query, segment, results.most);
  if (next.farthest < 0) return;
  const int64_t first_result = lims != nullptr ? lims[query] : query * results.most;

  const auto query_word = [&](int i) { return Vector<uint32_t, 1>{{search.queries.word(query, i)}}; };
  const int64_t begin = segment * shares.segment_codes + threadIdx.x % kWarpThreads;
  const int64_t end = min((segment + 1) * shares.segment_codes, search.codes.count);
  for (int64_t position = begin; __any_sync(kWholeWarp, position < end); position += kCodes * kWarpThreads) {
    int distances[kCodes][1];
    measure(search.codes, position, kWarpThreads, end, query_word, distances);
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int64_t at = position + c * kWarpThreads;
      const int distance = distances[c][0];
      const bool takes = at < end && distance <= next.farthest && search.may_find(query, at);
      if (!__any_sync(kWholeWarp, takes)) continue;
      const Count place = next.take(takes, distance);
      if (!takes || place >= static_cast<Count>(results.most)) continue;
      results.distances[first_result + place] = distance;
      results.positions[first_result + place] = at;
    }
  }
}

// The places that no result takes.
__global__ void __launch_bounds__(kFillThreads) fill_kernel(Shares shares, int64_t parts, int absent, Results results) {
  const int64_t query = blockIdx.x / parts, part = blockIdx.x - query * parts;
  const int64_t found = shares.places[query * (shares.distances + 1) + shares.distances];
  const int64_t end = min((part + 1) * kFilledPlaces, results.most);
  for (int64_t place = max(part * kFilledPlaces, found) + threadIdx.x; place < end; place += kFillThreads) {
    results.distances[query * results.most + place] = absent;
    results.positions[query * results.most + place] = -1;
  }
}

}  // namespace

int64_t hamming_ranking_batch(const HammingRanking& ranking) {
  HammingRanking one = ranking;
  one.search.query_count = 1;
  Shares shares(one, kBatchSegmentCodes);
  while (shares.segments > 1 && shares.bytes() > kWorkspaceBytes) shares = Shares(one, 2 * shares.segment_codes);
  return std::max<int64_t>(kWorkspaceBytes / shares.bytes(), 1);
}

int64_t hamming_ranking_workspace_bytes(const HammingRanking& ranking) { return cut(ranking).bytes(); }

void launch_hamming_ranking_count(const HammingRanking& ranking, int64_t* totals, void* workspace,
                                  cudaStream_t stream) {
  if (ranking.search.query_count == 0) return;
  const Shares shares = cut(ranking, workspace);
  const int64_t counter_bytes = shares.distances * static_cast<int64_t>(sizeof(unsigned));
  with_queries_of_a_block(shares.queries, counter_bytes, [&](auto queries) {
    constexpr int kQueries = decltype(queries)::value;
    const int64_t groups = ceil_div<int64_t>(shares.queries, kQueries);
    const bool in_shared = kQueries * counter_bytes <= kCounterBytes;
    if (!in_shared) cudaMemsetAsync(shares.counts, 0, shares.counters() * sizeof(Count), stream);
    const LaunchShape shape = {
        groups * shares.segments, kCountThreads,
        QueryBlock<kQueries>::bytes(ranking.search.code_bytes) + in_shared * kQueries * counter_bytes};
    launch(count_kernel<kQueries>, shape, stream, DeviceSearch(ranking.search), shares, groups, in_shared);
  });
  launch(sum_segments_kernel, ceil_div<int64_t>(shares.queries * shares.distances, kSumWarps), kSumWarps * kWarpThreads,
         stream, shares);
  launch(sum_distances_kernel, ceil_div<int64_t>(shares.queries, kSumWarps), kSumWarps * kWarpThreads, stream, shares,
         ranking.most, totals);
}

void launch_hamming_ranking_place(const HammingRanking& ranking, const int64_t* lims, int32_t* distances,
                                  int64_t* positions, void* workspace, cudaStream_t stream) {
  if (ranking.search.query_count == 0) return;
  const Shares shares = cut(ranking, workspace);
  const Results results = {distances, positions, ranking.most};
  const int64_t place_bytes = kPlaceWarps * shares.distances * static_cast<int64_t>(sizeof(Count));
  const bool in_shared = place_bytes <= kCounterBytes;
  const LaunchShape shape = {ceil_div<int64_t>(shares.queries * shares.segments, kPlaceWarps),
                             kPlaceWarps * kWarpThreads, in_shared ? place_bytes : 0};
  launch(in_shared ? place_kernel<true> : place_kernel<false>, shape, stream, DeviceSearch(ranking.search), shares,
         lims, results);
  if (lims != nullptr) return;
  const int64_t parts = ceil_div(ranking.most, kFilledPlaces);
  launch(fill_kernel, shares.queries * parts, kFillThreads, stream, shares, parts,
         static_cast<int>(8 * ranking.search.code_bytes + 1), results);
}

}  // namespace hashengine
