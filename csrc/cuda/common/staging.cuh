// Copies by a whole block between global and shared memory, 16 bytes at a time if the global array is aligned.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/common/vec.cuh"

namespace hashengine {

// Starts to copy `count` elements from global memory to `tile` in shared memory, which is aligned to 16 bytes. The copy
// is asynchronous: see wait_for_staged().
template <typename T>
__device__ __forceinline__ void stage(const T* source, int count, T* tile) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const int in_vectors = is_aligned(source) ? count / kWidth * kWidth : 0;
  for (int i = threadIdx.x * kWidth; i < in_vectors; i += blockDim.x * kWidth)
    __pipeline_memcpy_async(tile + i, source + i, kVectorBytes);
  for (int i = in_vectors + threadIdx.x; i < count; i += blockDim.x) tile[i] = source[i];
}

// Waits for all copies that the block's threads have started, and makes them visible to the whole block.
__device__ __forceinline__ void wait_for_staged() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
}

// Copies `count` elements from `tile` in shared memory, which is aligned to 16 bytes, to global memory.
template <typename T>
__device__ __forceinline__ void unstage(const T* tile, int count, T* target) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const int in_vectors = is_aligned(target) ? count / kWidth * kWidth : 0;
  for (int i = threadIdx.x * kWidth; i < in_vectors; i += blockDim.x * kWidth)
    vector_at<kWidth>(target, i) = vector_at<kWidth>(tile, i);
  for (int i = in_vectors + threadIdx.x; i < count; i += blockDim.x) target[i] = tile[i];
}

}  // namespace hashengine
