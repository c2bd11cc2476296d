// Functions with which a whole block copies between global and shared memory. A thread copies 16 bytes at a time if the
// global array is aligned to 16 bytes.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/common/vec.cuh"

namespace hashengine {

// Starts to copy `count` elements from global memory to `tile` in shared memory. `tile` must be aligned to 16 bytes.
// The copy is complete only after wait_for_staged().
template <typename T>
__device__ __forceinline__ void stage(const T* source, int count, T* tile) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const int vectors_end = is_aligned(source) ? count / kWidth * kWidth : 0;
  for (int i = threadIdx.x * kWidth; i < vectors_end; i += blockDim.x * kWidth)
    __pipeline_memcpy_async(tile + i, source + i, kVectorBytes);
  for (int i = vectors_end + threadIdx.x; i < count; i += blockDim.x) tile[i] = source[i];
}

// Waits for all copies that the block's threads have started, and makes the copies visible to the whole block. Every
// thread must call.
__device__ __forceinline__ void wait_for_staged() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
}

// Copies `count` elements from `tile` in shared memory to global memory. `tile` must be aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ void unstage(const T* tile, int count, T* target) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const int vectors_end = is_aligned(target) ? count / kWidth * kWidth : 0;
  for (int i = threadIdx.x * kWidth; i < vectors_end; i += blockDim.x * kWidth)
    vector_at<kWidth>(target, i) = vector_at<kWidth>(tile, i);
  for (int i = vectors_end + threadIdx.x; i < count; i += blockDim.x) target[i] = tile[i];
}

}  // namespace hashengine
