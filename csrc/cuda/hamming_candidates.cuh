// Candidates of a top-k search: what a scan of the codes leaves of each query for the selection.
//
// A key is (distance, position) in one number, so that the order of results is the order of keys. A query's limit is a key,
// too: the code at that place of the order or a little beyond the k-th. Ties at the limit's distance are cut by position,
// so that a million equal codes are no more candidates than others. A limit is a guess from a sample: the selection finds
// out where it left too few or too many, and looks at all codes then.
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

  // The largest distance at which a code at `first` or behind it can be a candidate; -1: none can.
  HE_HOST_DEVICE int largest_distance(uint64_t limit, int64_t first) const {
    return distance(limit) - (position(limit) < first);
  }
};

// As many keys as fit are kept, in no order; the counts tell how many there were.
struct Candidates {
  uint64_t* keys;     // [query_count, capacity]
  unsigned* counts;   // [query_count]
  uint64_t* limits;   // [query_count]
  int64_t capacity;
  Keys layout;

  // Takes the code if it is within the query's limit and may be found. A scan may offer too many, but each once.
  __device__ __forceinline__ void offer(const DeviceSearch& search, int64_t query, int64_t position) const {
    const uint64_t key = layout.key(search.distance(query, position), position);
    if (key > limits[query] || !search.may_find(query, position)) return;
    const int64_t place = atomicAdd(&counts[query], 1u);
    if (place < capacity) keys[query * capacity + place] = key;
  }
};

}  // namespace hashengine
