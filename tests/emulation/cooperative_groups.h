// Thread-block clusters: blocks that can access each other's shared memory.
#pragma once

#include <cuda_runtime.h>

namespace emulation {

unsigned cluster_rank();
unsigned cluster_blocks();
void cluster_barrier();
void cluster_arrive();
void cluster_wait();
// Takes the address of a shared variable in the running block. Returns the address of the same variable in block `rank`
// of the cluster.
void* map_shared(const void* address, unsigned rank);

}  // namespace emulation

namespace cooperative_groups {

struct cluster_group {
  static void sync() { emulation::cluster_barrier(); }
  static unsigned block_rank() { return emulation::cluster_rank(); }
  static unsigned num_blocks() { return emulation::cluster_blocks(); }
  template <typename T>
  static T* map_shared_rank(T* address, int rank) {
    return static_cast<T*>(emulation::map_shared(address, unsigned(rank)));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

inline void __cluster_barrier_arrive_relaxed() { emulation::cluster_arrive(); }
inline void __cluster_barrier_wait() { emulation::cluster_wait(); }
