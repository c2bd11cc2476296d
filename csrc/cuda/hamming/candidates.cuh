// The candidates of a top-k search: the codes that a scan keeps for the selection.
//
// Key. A distance and a position, packed into one number so that keys are ordered like results.
//
// Bound. The largest key that a candidate may have; each query has its own. bounds.cu estimates it from a sample. It is
// usually the key of a code slightly farther from the query than the k-th nearest code. Because a bound includes a
// position, it admits only some of the codes at its own distance. Therefore a query has few candidates even if all
// codes of the database are equal. If a bound admits too few or too many candidates, the selection (select.cu) detects
// it and reads all codes instead.
//
// Tightening. Once k candidates are nearer than the bound, a code farther than all of them cannot be a result.
// Therefore a scan recomputes each query's maximum distance before each chunk, from counters of the candidates found so
// far. Other blocks may be incrementing these counters. A counter that is read too early is too small, and makes the
// maximum distance too large. This admits unnecessary candidates, but loses none of the k nearest codes.
#pragma once

#include "cuda/hamming/device_search.cuh"

namespace hashengine {

struct DeviceKeyFormat {
  int position_bits;  // a key's lowest position_bits bits hold the position, the bits above hold the distance

  HE_HOST_DEVICE uint64_t key(int64_t distance, int64_t position) const {
    return static_cast<uint64_t>(distance) << position_bits | static_cast<uint64_t>(position);
  }
  HE_HOST_DEVICE int distance(uint64_t key) const { return static_cast<int>(key >> position_bits); }
  HE_HOST_DEVICE int64_t position(uint64_t key) const {
    return static_cast<int64_t>(key & ((uint64_t{1} << position_bits) - 1));
  }
};

struct Candidates {
  // A candidate's margin is the distance of the query's bound minus the distance of the candidate. All margins of
  // kMargins - 1 or more are counted together.
  static constexpr int kMargins = 16;

  uint64_t* keys;           // [query_count, capacity], unordered; candidates beyond the capacity are only counted
  uint64_t* bounds;         // [query_count]
  unsigned* counts;         // [query_count], candidates per query, including those beyond the capacity
  unsigned* margin_counts;  // [query_count, kMargins], candidates per query and margin
  int64_t capacity;         // candidates per query for which `keys` has space
  unsigned k;               // results per query
  DeviceKeyFormat format;

  // Adds a code at the given distance to the candidates if it is within the query's bound and passes the filter. A scan
  // may call this for any code, but at most once per query and code.
  __device__ __forceinline__ void add_if_within_bound(const DeviceSearch& search, int64_t query, int64_t position,
                                                      int distance) const {
    const uint64_t key = format.key(distance, position), bound = bounds[query];
    if (key > bound || !search.passes_filter(query, position)) return;
    atomicAdd(&margin_counts[query * kMargins + min(format.distance(bound) - distance, kMargins - 1)], 1u);
    const int64_t slot = atomicAdd(&counts[query], 1u);
    if (slot < capacity) keys[query * capacity + slot] = key;
  }

  // The same, with the distance that it computes.
  __device__ __forceinline__ void add_if_within_bound(const DeviceSearch& search, int64_t query,
                                                      int64_t position) const {
    add_if_within_bound(search, query, position, search.distance(query, position));
  }

  // The largest distance at which a code at position `first` or later can still be among the k nearest codes; -1 if no
  // such code can be. It shrinks during a scan: if k candidates have a margin of at least m, the distance of the k-th
  // nearest code is at most the bound's distance minus m.
  __device__ __forceinline__ int max_distance(int64_t query, int64_t first) const {
    const uint64_t bound = bounds[query];
    const int distance = format.distance(bound);
    const auto* counts_by_four = reinterpret_cast<const uint4*>(margin_counts + query * kMargins);
    unsigned accepted = 0;  // the number of candidates whose margin is at least 4 * i + j
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
