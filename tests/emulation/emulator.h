// Internal declarations of the emulator. emulator.cpp: launches, fibers, schedules. synchronisation.cpp: barriers,
// warps. shared_memory.cpp: shared memory, asynchronous copies. matrix.cpp: matrix instructions.
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

// A matrix product that a thread has started and not yet waited for.
struct MatrixProduct {
  uint32_t* sums;
  std::vector<uint32_t> before;  // the sums at the start
  uint32_t rows[4];
  const uint32_t* columns;
  bool accumulate;
};

enum class Wait { kNone, kBlock, kCluster };

struct Fiber {
  ucontext_t context;
  uint3 thread;
  uint64_t priority;
  Wait wait = Wait::kNone;
  Lanes exchanged;           // the result of the last exchange
  std::vector<Copy> issued;  // asynchronous copies since the last commit
  std::deque<std::vector<Copy>> committed;
  std::vector<MatrixProduct> products;
};

struct Collective {
  const char* operation;
  Lanes lanes;
};

struct Warp {
  unsigned alive = 0;                        // the lanes that have not exited
  std::map<unsigned, Collective> gathering;  // per mask: disjoint groups of lanes do not wait for each other
};

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned alive, at_barrier = 0, at_cluster_barrier = 0;  // numbers of threads
  bool has_started = false;
  std::vector<char> declared;  // the contents of the __shared__ variables while another block runs
  std::unique_ptr<char[]> dynamic;
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

// emulator.cpp
void make_ready(unsigned id);
void make_unready(unsigned id);
void suspend();  // returns when the schedule picks the fiber again

// synchronisation.cpp. A barrier or a collective is complete when every fiber that it waits for has arrived or exited.
// The release functions make the fibers ready whose barrier or collective is complete.
void release_barriers();
void release_collectives();
std::string describe_waiting(const Block& block);

// shared_memory.cpp
void allocate_shared_memory(Block& block);
void begin_shared_memory(Block& block);  // call when the first thread starts; discards earlier writes by peers
void end_shared_memory(Block& block);    // call when the last thread has exited; makes later reads by peers invalid
void swap_in(Block& block);              // moves the block's __shared__ variables to where the kernel accesses them

}  // namespace emulation
