// Sums over a warp, a block and a grid. The order of addition is fixed, so equal inputs give bit-identical results.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hashengine {

constexpr int kWarpThreads = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// The sum over a warp, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  return value;
}

// The sum over a block, in thread 0. The block is one-dimensional and consists of whole warps. A second call with the
// same T needs a __syncthreads() before it.
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T warp_sums[kWarpThreads];
  const unsigned lane = threadIdx.x % kWarpThreads;
  const unsigned warp = threadIdx.x / kWarpThreads;
  value = warp_sum(value);
  if (lane == 0) warp_sums[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < blockDim.x / kWarpThreads ? warp_sums[lane] : T(0));
  return value;
}

// The workspace of grid_sum: a header with the number of finished blocks, which must be zero before the launch, then
// one sum per block.
constexpr int64_t kGridSumHeaderBytes = 16;

template <typename T>
constexpr int64_t grid_sum_workspace_bytes(int64_t blocks) {
  return kGridSumHeaderBytes + blocks * static_cast<int64_t>(sizeof(T));
}

// Counts this block as finished; thread 0 must already have stored the values that other blocks read. Returns true in
// every thread of the block that finishes last. Every thread must call.
__device__ __forceinline__ bool finishes_last(unsigned* finished_blocks) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();  // makes the stores visible to the device before the count
    is_last = atomicAdd(finished_blocks, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

// Sums the `block_total` that thread 0 of each block passes. Returns true in one thread of the grid, thread 0 of the
// block that finishes last, and sets `grid_total` only there. The order of the additions is the same whichever block
// finishes last. Every thread must call.
template <typename T>
__device__ __forceinline__ bool grid_sum(T block_total, void* workspace, double& grid_total) {
  auto* block_totals = reinterpret_cast<T*>(static_cast<char*>(workspace) + kGridSumHeaderBytes);
  if (threadIdx.x == 0) block_totals[blockIdx.x] = block_total;
  if (!finishes_last(static_cast<unsigned*>(workspace))) return false;
  double total = 0;
  // __ldcg reads from L2, which holds the other blocks' stores; L1 is not coherent.
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) total += __ldcg(&block_totals[block]);
  grid_total = block_sum(total);
  return threadIdx.x == 0;
}

}  // namespace hashengine
