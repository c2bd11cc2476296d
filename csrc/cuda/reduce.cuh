// Sums over a warp, a block and a grid. Every order of addition is fixed, so the same input gives the same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hashengine {

constexpr int kWarpThreads = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// In every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  return value;
}

// In thread 0. Blocks are whole warps in one dimension. A second call with the same T needs a __syncthreads before it.
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

// Scratch of grid_sum: the number of blocks that are done, zero before the launch, and after it a sum from each block.
constexpr int64_t kGridSumHeaderBytes = 16;

template <typename T>
constexpr int64_t grid_sum_workspace_bytes(int64_t blocks) {
  return kGridSumHeaderBytes + blocks * static_cast<int64_t>(sizeof(T));
}

// Counts the block as finished, once its thread 0 has stored what another block will read. True in every thread of the
// block that comes last. Every thread must call.
__device__ __forceinline__ bool finishes_last(unsigned* finished_blocks) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();  // what was stored is visible to the device before the count says so
    is_last = atomicAdd(finished_blocks, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

// Adds the `block_total` of every block's thread 0. Returns true in thread 0 of the block that comes last, which alone
// gets `grid_total`; it reads the others' sums in the order of the blocks, whoever was last. Every thread must call.
template <typename T>
__device__ __forceinline__ bool grid_sum(T block_total, void* workspace, double& grid_total) {
  auto* block_totals = reinterpret_cast<T*>(static_cast<char*>(workspace) + kGridSumHeaderBytes);
  if (threadIdx.x == 0) block_totals[blockIdx.x] = block_total;
  if (!finishes_last(static_cast<unsigned*>(workspace))) return false;
  double total = 0;
  // __ldcg: from L2, where the other blocks' stores are; L1 keeps no coherence.
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) total += __ldcg(&block_totals[block]);
  grid_total = block_sum(total);
  return threadIdx.x == 0;
}

}  // namespace hashengine
