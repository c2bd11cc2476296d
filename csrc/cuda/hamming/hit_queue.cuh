// A queue, one per warp, of the hits of a matrix scan: pairs of a query and a position that may be candidates. A
// verification takes one memory latency of about 500 cycles, whether the warp verifies one hit or 32 hits at a time.
// Therefore hits are buffered in shared memory and verified 32 at a time.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/hamming/candidates.cuh"

namespace hashengine {

struct HitQueue {
  static constexpr unsigned kCapacity = 96;

  uint2 hits[kCapacity];  // query, position
  unsigned count;         // the caller sets it to zero before the first push

  // Any lane may call. A hit that finds the queue full is verified immediately.
  __device__ __forceinline__ void push(const DeviceSearch& search, const Candidates& candidates, int64_t query,
                                       int64_t position) {
    const unsigned slot = atomicAdd(&count, 1u);
    if (slot < kCapacity)
      hits[slot] = make_uint2(static_cast<unsigned>(query), static_cast<unsigned>(position));
    else
      candidates.add_if_within_bound(search, query, position);
  }

  // Verifies all queued hits and empties the queue, if it holds at least `min_count`. The whole warp must call.
  __device__ __forceinline__ void drain(const DeviceSearch& search, const Candidates& candidates, unsigned min_count) {
    __syncwarp();
    const unsigned queued = count;
    if (queued < min_count) return;
    for (unsigned i = threadIdx.x % kWarpThreads; i < min(queued, kCapacity); i += kWarpThreads)
      candidates.add_if_within_bound(search, hits[i].x, hits[i].y);
    __syncwarp();
    if (threadIdx.x % kWarpThreads == 0) count = 0;
    __syncwarp();
  }
};

}  // namespace hashengine
