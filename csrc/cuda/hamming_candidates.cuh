// Candidates of a top-k search: what a scan of the codes leaves of each query for the selection.
//
// A key is (distance, position) in one number, so that the order of results is the order of keys. A query's limit is a
// key, too: the code at that place of the order or a little beyond the k-th. Ties at the limit's distance are cut by
// position, so that a million equal codes are no more candidates than others. A limit is a guess from a sample: the
// selection finds out where it left too few or too many, and looks at all codes then. The candidates that a scan has
// taken tell more than the sample did, so it asks again how far it has to look; a sum of counts that are read while
// others add to them may be too small, never too large.
#pragma once

#include "hamming_code.cuh"

namespace hashengine {

struct Keys {
  int position_bits;

  HE_HOST_DEVICE uint64_t key(int64_t distance, int64_t position) const {
    return static_cast<uint64_t>(distance) << position_bits | static_cast<uint64_t>(position);
  }
  HE_HOST_DEVICE int distance(uint64_t key) const { return static_cast<int>(key >> position_bits); }
  HE_HOST_DEVICE int64_t position(uint64_t key) const {
    return static_cast<int64_t>(key & ((uint64_t{1} << position_bits) - 1));
  }
};

// As many keys as fit are kept, in no order; the counts tell how many there were.
struct Candidates {
  // Steps of distance below the limit's that are told apart.
  static constexpr int kSteps = 16;

  uint64_t* keys;    // [query_count, capacity]
  uint64_t* limits;  // [query_count]
  unsigned* counts;  // [query_count]
  unsigned* nearer;  // [query_count, kSteps], candidates so much nearer than the limit; the last: or nearer still
  int64_t capacity;
  unsigned k;
  Keys layout;

  // Takes the code if it is within the query's limit and may be found. A scan may offer too many, but each once.
  __device__ __forceinline__ void offer(const DeviceSearch& search, int64_t query, int64_t position) const {
    const int distance = search.distance(query, position);
    const uint64_t key = layout.key(distance, position), limit = limits[query];
    if (key > limit || !search.may_find(query, position)) return;
    atomicAdd(&nearer[query * kSteps + min(layout.distance(limit) - distance, kSteps - 1)], 1u);
    const int64_t place = atomicAdd(&counts[query], 1u);
    if (place < capacity) keys[query * capacity + place] = key;
  }

  // The largest distance at which a code at `first` or behind it has to be offered now; -1: none has. As the candidates
  // taken so far, anywhere, tell how far the k-th is at most, it shrinks while the scan goes on.
  __device__ __forceinline__ int largest_distance(int64_t query, int64_t first) const {
    const uint64_t limit = limits[query];
    const int distance = layout.distance(limit);
    const auto* counts_of_steps = reinterpret_cast<const uint4*>(nearer + query * kSteps);
    unsigned taken = 0;
    int step = 0;
#pragma unroll
    for (int i = kSteps / 4 - 1; i >= 0; --i) {
      const uint4 part = __ldcg(counts_of_steps + i);  // from L2, where other blocks' atomics are
      const unsigned counted[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
      for (int j = 3; j >= 0; --j) {
        taken += counted[j];
        if (taken >= k) step = max(step, 4 * i + j);
      }
    }
    return min(distance - step, distance - (layout.position(limit) < first ? 1 : 0));
  }
};

}  // namespace hashengine
