// Runs of memory to shared memory and back by a whole block, in 16-byte pieces where the run is aligned to them.
#pragma once

#include <cuda_pipeline.h>

#include "vec.cuh"

namespace hashengine {

// Begins to copy `count` elements into `tile`, which is aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ void stage(const T* run, int count, T* tile) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const int in_vectors = is_aligned(run) ? count / kWidth * kWidth : 0;
  for (int i = threadIdx.x * kWidth; i < in_vectors; i += blockDim.x * kWidth)
    __pipeline_memcpy_async(tile + i, run + i, kVectorBytes);
  for (int i = in_vectors + threadIdx.x; i < count; i += blockDim.x) tile[i] = run[i];
}

// Everything that the block's threads have begun to copy is there for all of them.
__device__ __forceinline__ void wait_for_staged() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
}

template <typename T>
__device__ __forceinline__ void unstage(const T* tile, int count, T* run) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const int in_vectors = is_aligned(run) ? count / kWidth * kWidth : 0;
  for (int i = threadIdx.x * kWidth; i < in_vectors; i += blockDim.x * kWidth)
    vector_at<kWidth>(run, i) = vector_at<kWidth>(tile, i);
  for (int i = in_vectors + threadIdx.x; i < count; i += blockDim.x) run[i] = tile[i];
}

}  // namespace hashengine
