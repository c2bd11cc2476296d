// The candidates of a top-k search: the codes that a scan keeps for the selection.
//
// Key. A distance and a position packed into one number, so that keys are ordered like results.
//
// Bound. The largest key that a candidate of a query may have: usually the key of a code that is slightly farther from
// the query than the k-th nearest code. It includes a position, so that it also cuts off ties at its distance: a
// database of a million equal codes has no more candidates than any other. It is estimated from a sample. If it admits
// too few or too many candidates, the selection notices and reads all codes of the database instead.
//
// Tightening. The candidates accepted so far bound the k-th distance more tightly than the sample does, so a scan
// recomputes its maximum distances before each chunk. For this it sums counters that other blocks may be incrementing.
// The sum is never too large. If it is too small, the maximum distance is larger than necessary, which only admits
// unnecessary candidates.
#pragma once

#include "cuda/hamming/device_search.cuh"

namespace hashengine {

struct DeviceKeyFormat {
  int position_bits;

  HE_HOST_DEVICE uint64_t key(int64_t distance, int64_t position) const {
    return static_cast<uint64_t>(distance) << position_bits | static_cast<uint64_t>(position);
  }
  HE_HOST_DEVICE int distance(uint64_t key) const { return static_cast<int>(key >> position_bits); }
  HE_HOST_DEVICE int64_t position(uint64_t key) const {
    return static_cast<int64_t>(key & ((uint64_t{1} << position_bits) - 1));
  }
};

struct Candidates {
  // A candidate's margin is the bound's distance minus its own distance. All margins of kMargins - 1 or more are
  // counted together.
  static constexpr int kMargins = 16;

  uint64_t* keys;           // [query_count, capacity], unordered; candidates beyond the capacity are only counted
  uint64_t* bounds;         // [query_count]
  unsigned* counts;         // [query_count], candidates per query
  unsigned* margin_counts;  // [query_count, kMargins], candidates per margin
  int64_t capacity;
  unsigned k;
  DeviceKeyFormat format;

  // Computes the exact distance of a code and makes it a candidate if it is within the query's bound and passes the
  // filter. A scan may call this for codes that do not qualify, but at most once per query and code.
  __device__ __forceinline__ void add_if_within_bound(const DeviceSearch& search, int64_t query,
                                                      int64_t position) const {
    const int distance = search.distance(query, position);
    const uint64_t key = format.key(distance, position), bound = bounds[query];
    if (key > bound || !search.passes_filter(query, position)) return;
    atomicAdd(&margin_counts[query * kMargins + min(format.distance(bound) - distance, kMargins - 1)], 1u);
    const int64_t slot = atomicAdd(&counts[query], 1u);
    if (slot < capacity) keys[query * capacity + slot] = key;
  }

  // The largest distance at which a code at position `first` or later can still be among the k nearest; -1 if none can
  // be. It shrinks during a scan: if k candidates have a margin of at least m, the k-th nearest code is at least m
  // closer than the bound.
  __device__ __forceinline__ int max_distance(int64_t query, int64_t first) const {
    const uint64_t bound = bounds[query];
    const int distance = format.distance(bound);
    const auto* counts_by_four = reinterpret_cast<const uint4*>(margin_counts + query * kMargins);
    unsigned accepted = 0;  // the candidates whose margin is at least the current one
    int margin = 0;
#pragma unroll
    for (int i = kMargins / 4 - 1; i >= 0; --i) {
      const uint4 four = __ldcg(counts_by_four + i);  // from L2, where the other blocks' atomics take place
      const unsigned counted[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 3; j >= 0; --j) {
        accepted += counted[j];
        if (accepted >= k) margin = max(margin, 4 * i + j);
      }
    }
    return min(distance - margin, distance - (format.position(bound) < first ? 1 : 0));
  }
};

}  // namespace hashengine
