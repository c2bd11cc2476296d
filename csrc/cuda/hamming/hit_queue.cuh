// A queue of hits for scan_mma; each warp has one. A hit is a pair of a query and a position whose code may be a
// candidate. To verify a hit, a lane computes the exact distance. A warp needs about one memory latency
// (estimated at 500 cycles) to verify one hit, and the same time to verify 32. Therefore the hits wait in shared memory
// until there are at least 32 or the scan ends.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/hamming/candidates.cuh"

namespace hashengine {

struct HitQueue {
  static constexpr unsigned kCapacity = 96;

  uint2 hits[kCapacity];  // query, position
  unsigned count;         // the caller sets it to zero before the first push

  // Adds a hit. Any lane may call. If the queue is full, the lane verifies the hit immediately.
  __device__ __forceinline__ void push(const DeviceSearch& search, const Candidates& candidates, int64_t query,
                                       int64_t position) {
    const unsigned slot = atomicAdd(&count, 1u);
    if (slot < kCapacity)
      hits[slot] = make_uint2(static_cast<unsigned>(query), static_cast<unsigned>(position));
    else
      candidates.add_if_within_bound(search, query, position);
  }

  // If the queue has at least `min_count` hits, verifies all of them and empties the queue. The whole warp must call.
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
