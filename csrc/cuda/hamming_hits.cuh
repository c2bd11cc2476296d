// What a warp's matrix sums tell may be candidates. To look at one takes as long as to look at 32, half a thousand
// cycles until memory has answered, so they wait in shared memory until there are as many.
#pragma once

#include "hamming_candidates.cuh"
#include "reduce.cuh"

namespace hashengine {

struct HitQueue {
  static constexpr unsigned kCapacity = 96;

  uint2 hits[kCapacity];  // query, position
  unsigned count;         // zero before the first push

  // By any lane. What finds no room is looked at right away.
  __device__ __forceinline__ void push(const DeviceSearch& search, const Candidates& candidates, int64_t query,
                                       int64_t position) {
    const unsigned place = atomicAdd(&count, 1u);
    if (place < kCapacity)
      hits[place] = make_uint2(static_cast<unsigned>(query), static_cast<unsigned>(position));
    else
      candidates.offer(search, query, position);
  }

  // Offers what waits, if there are at least so many; by the whole warp.
  __device__ __forceinline__ void drain(const DeviceSearch& search, const Candidates& candidates, unsigned at_least) {
    __syncwarp();
    const unsigned waiting = count;
    if (waiting < at_least) return;
    for (unsigned i = threadIdx.x % kWarpThreads; i < min(waiting, kCapacity); i += kWarpThreads)
      candidates.offer(search, hits[i].x, hits[i].y);
    __syncwarp();
    if (threadIdx.x % kWarpThreads == 0) count = 0;
    __syncwarp();
  }
};

}  // namespace hashengine
