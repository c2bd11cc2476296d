// Thread-block clusters: blocks that run at the same time and reach each other's shared memory. Architectures before
// 9.0 have none; there a block is its own cluster.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace hashengine {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// A barrier of all threads of the cluster; what they wrote to shared memory before is seen after.
__device__ __forceinline__ void cluster_sync() { cooperative_groups::this_cluster().sync(); }
__device__ __forceinline__ int cluster_rank() {
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
}
__device__ __forceinline__ int cluster_blocks() {
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
}
// Where the shared variable lies in block `rank`, which must have begun, and must not have ended when it is used.
template <typename T>
__device__ __forceinline__ T* map_to_rank(T* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}

#else

__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_blocks() { return 1; }
template <typename T>
__device__ __forceinline__ T* map_to_rank(T* shared, int) {
  return shared;
}

#endif

}  // namespace hashengine
