// Thread-block clusters: blocks that run at the same time and can access each other's shared memory. Architectures
// before 9.0 have no clusters; there each block is a cluster of its own.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace hashengine {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// A barrier for all threads of the cluster. After it, all of them see the writes to shared memory before it.
__device__ __forceinline__ void cluster_sync() { cooperative_groups::this_cluster().sync(); }
// The two halves of a barrier that publishes no writes, and therefore does not wait for earlier loads and stores: after
// the wait, all threads of the cluster have arrived. Every thread calls one after the other, and no other barrier of
// the cluster in between.
__device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive_relaxed(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }
__device__ __forceinline__ int cluster_rank() {
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
}
__device__ __forceinline__ int cluster_blocks() {
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
}
// `shared` points to a shared variable of this block. Returns the address of the same variable in block `rank`. The
// address is valid only while that block runs. cluster_wait() and cluster_sync() ensure that all blocks have started; a
// block must not exit before the last access to its memory.
template <typename T>
__device__ __forceinline__ T* map_to_rank(T* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}

#else

__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_blocks() { return 1; }
template <typename T>
__device__ __forceinline__ T* map_to_rank(T* shared, int) {
  return shared;
}

#endif

}  // namespace hashengine
