// What the parts of the emulator share: emulator.cpp (launches, fibers, schedules), synchronisation.cpp (barriers,
// warps), shared_memory.cpp (shared memory, asynchronous copies) and matrix.cpp (matrix instructions).
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

// A product that the matrix unit has been given, by one thread.
struct MatrixProduct {
  uint32_t* sums;
  std::vector<uint32_t> before;  // what the sums were
  uint32_t rows[4];
  const uint32_t* columns;
  bool keep_sums;
};

enum class Wait { kNone, kBlock, kCluster };

struct Fiber {
  ucontext_t context;
  uint3 thread;
  uint64_t priority;
  Wait wait = Wait::kNone;
  Lanes exchanged;           // what the last exchange gave
  std::vector<Copy> issued;  // asynchronous copies since the last commit
  std::deque<std::vector<Copy>> committed;
  std::vector<MatrixProduct> products;
};

struct Collective {
  const char* operation;
  Lanes lanes;
};

struct Warp {
  unsigned alive = 0;                        // lanes that have not exited
  std::map<unsigned, Collective> gathering;  // by mask: disjoint groups of lanes do not wait for each other
};

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned alive, at_barrier = 0, at_cluster_barrier = 0;
  bool has_started = false;
  std::vector<char> declared;  // contents of the __shared__ variables while another block runs
  std::unique_ptr<char[]> dynamic;
};

// Of the launch. A fiber's id is its block's slot * kMaxThreads + its thread. The blocks of a cluster lie in
// consecutive slots, from a multiple of their number on.
extern std::vector<std::unique_ptr<Block>> resident;
extern unsigned running;
extern unsigned cluster_size;
extern size_t dynamic_bytes;
extern Block* in_place;  // the block whose __shared__ variables are where the kernel looks for them, or null

inline Fiber& fiber_of(unsigned id) { return resident[id / kMaxThreads]->fibers[id % kMaxThreads]; }
inline Fiber& fiber() { return fiber_of(running); }
inline Block& block() { return *resident[running / kMaxThreads]; }
inline Warp& warp() { return block().warps[running % kMaxThreads / kWarpThreads]; }

// emulator.cpp
void make_ready(unsigned id);
void make_unready(unsigned id);
void suspend();  // until the schedule picks the running fiber again

// synchronisation.cpp: whatever waits only for threads that have exited by now goes on.
void release_barriers();
void release_collectives();
std::string describe_waiting(const Block& block);

// shared_memory.cpp
void allocate_shared_memory(Block& block);
void begin_shared_memory(Block& block);  // when its first thread runs: what a peer wrote before is lost
void end_shared_memory(Block& block);    // when its last thread has exited: what a peer reads from now on is wrong
void put_in_place(Block& block);         // the __shared__ variables of the block that is to run

}  // namespace emulation
