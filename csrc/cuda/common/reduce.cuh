// Sums over a warp, a block and a grid. For a given launch shape the order of the additions is fixed, so equal inputs
// give bit-identical results.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hashengine {

constexpr int kWarpThreads = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Returns the sum of `value` over a warp, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  return value;
}

// Returns the sum of `value` over a block in thread 0; the other threads must ignore the result. The block is
// one-dimensional and consists of whole warps. Between two calls with the same T there must be a __syncthreads().
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

// The workspace of grid_sum begins with a header, the number of finished blocks. The header must be zero before the
// launch. One sum per block follows.
constexpr int64_t kGridSumHeaderBytes = 16;

template <typename T>
constexpr int64_t grid_sum_workspace_bytes(int64_t blocks) {
  return kGridSumHeaderBytes + blocks * static_cast<int64_t>(sizeof(T));
}

// Counts this block as finished. Before the call, thread 0 must have stored the values that other blocks will read.
// Returns true in all threads of the block that is counted last, otherwise false. Every thread must call.
__device__ __forceinline__ bool finishes_last(unsigned* finished_blocks) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();  // makes the stores of thread 0 visible to the device before the count
    is_last = atomicAdd(finished_blocks, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

// Sums the values that the blocks' threads 0 pass as `block_total`. Only thread 0 of the block that finishes last gets
// the result: there the function returns true, and `grid_total` is the sum. All other threads get false and must ignore
// `grid_total`. The order of the additions does not depend on which block finishes last. Every thread must call.
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
