// Internal declarations of the emulator. emulator.cpp: launches, fibers, schedules. synchronisation.cpp: barriers and
// collective operations. shared_memory.cpp: shared memory, asynchronous copies. matrix.cpp: matrix instructions.
//
// A collective operation is a shuffle, a vote, a __syncwarp or a matrix instruction: the lanes that its mask names wait
// for each other.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace emulation {

constexpr unsigned kWarpThreads = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxClusterBlocks = 16;
constexpr char kPoison = '\xff';  // NaN in every floating-point type

struct Copy {
  char* target;
  const char* source;
  size_t bytes, zeros;
};

// A matrix product that a thread has started but has not yet waited for.
struct MatrixProduct {
  uint32_t* sums;
  std::vector<uint32_t> before;  // the values of the sums when the product was started
  const uint32_t* rows;
  uint32_t rows_before[4];
  uint64_t columns;  // the descriptor of the tile
  bool accumulate;
};

// kPrevious: for the end of the previous kernel.
enum class Wait { kNone, kBlock, kCluster, kPrevious };

// Between its arrival and its wait, a thread has arrived, and later all threads of the cluster have.
enum class ClusterBarrier { kNone, kArrived, kComplete };

struct Fiber {
  ucontext_t context;
  uint3 thread;
  uint64_t priority;
  Wait wait = Wait::kNone;
  ClusterBarrier cluster_barrier = ClusterBarrier::kNone;
  Lanes gathered;            // the result of the fiber's last collective operation
  std::vector<Copy> issued;  // asynchronous copies since the last commit
  std::deque<std::vector<Copy>> committed;
  std::vector<MatrixProduct> products;
  bool has_fenced = false;      // since the last wgmma_wait()
  size_t started_products = 0;  // since the launch
};

// What all threads of a warpgroup must pass to a wgmma.
struct MatrixOperation {
  uint64_t columns;
  size_t sums;
  bool accumulate;
  bool operator==(const MatrixOperation& other) const {
    return columns == other.columns && sums == other.sums && accumulate == other.accumulate;
  }
};

// A collective operation that some of its lanes have not reached yet.
struct Collective {
  const char* operation;
  Lanes lanes;
};

struct Warp {
  unsigned alive = 0;                         // mask of the lanes that have not exited
  std::map<unsigned, Collective> unfinished;  // by mask: lanes with disjoint masks do not wait for each other
};

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::vector<MatrixOperation>> matrix_operations;  // of each warpgroup since the launch
  unsigned alive, at_barrier = 0, at_cluster_barrier = 0;       // numbers of threads; alive: have not exited
  bool has_started = false;
  std::vector<char> declared;       // the contents of the __shared__ variables while another block runs
  std::unique_ptr<char[]> dynamic;  // the dynamic shared memory
};

// The state of the launch. Resident blocks occupy slots; the blocks of a cluster have consecutive slots, the first of
// which is a multiple of the cluster size. A fiber's id is slot * kMaxThreads + thread.
extern std::vector<std::unique_ptr<Block>> resident;
extern unsigned running;  // the id of the running fiber
extern unsigned cluster_size;
extern size_t dynamic_bytes;
extern Block* swapped_in;  // the block whose __shared__ variables are in the module's thread-local storage; may be null

inline Fiber& fiber_of(unsigned id) { return resident[id / kMaxThreads]->fibers[id % kMaxThreads]; }
inline Fiber& fiber() { return fiber_of(running); }
inline Block& block() { return *resident[running / kMaxThreads]; }
inline Warp& warp() { return block().warps[running % kMaxThreads / kWarpThreads]; }

// matrix.cpp. To call when the last thread of a block exits: fails if a thread has started fewer products than its
// warpgroup.
void check_products();

// emulator.cpp
void make_ready(unsigned id);
void make_unready(unsigned id);
void suspend();  // returns when the schedule picks the fiber again

// synchronisation.cpp. A barrier or a collective operation is complete when every fiber that it waits for has arrived
// or exited. If it is complete, the release functions make the waiting fibers ready.
void release_barriers();
void release_collectives();
std::string describe_waiting(const Block& block);

// shared_memory.cpp
// The variable at an address that shared_address() returned, in the running block.
const uint32_t* at_shared_address(uint32_t address, size_t bytes);
void allocate_shared_memory(Block& block);
// To call when the block's first thread starts. Discards what other blocks of the cluster have written before.
void begin_shared_memory(Block& block);
// To call when the block's last thread has exited. Makes later reads by other blocks of the cluster invalid.
void end_shared_memory(Block& block);
// Copies the block's __shared__ variables to the module's thread-local storage, where the kernel accesses them.
void swap_in(Block& block);
// The opposite: stores the variables of the block that is swapped in.
void swap_out();

}  // namespace emulation
