// The emulator behind cuda_runtime.h: fibers, schedules, barriers, warps, shared memory.

#include <cuda_runtime.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr unsigned kWarpThreads = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kResidentBlocks = 3;
constexpr size_t kStackBytes = 128 << 10;
constexpr char kPoison = '\xff';  // NaN in every floating-point type

// The ready fiber with the least priority runs. Any other schedule seeds random priorities; there an atomic also puts
// its thread behind all others half of the time, so that the rest of the grid overtakes it.
enum Schedule { kForward = 0, kReverse = 1 };
constexpr uint64_t kBehindAll = ~uint64_t(0);

struct Collective {
  const char* operation;
  Lanes lanes;
};

struct Warp {
  unsigned alive = 0;                        // lanes that have not exited
  std::map<unsigned, Collective> gathering;  // by mask: disjoint groups of lanes do not wait for each other
};

struct Fiber {
  ucontext_t context;
  uint3 thread;
  uint64_t priority;
  bool waits_at_barrier = false;
  Lanes exchanged;  // what the last exchange gave
};

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned alive, at_barrier = 0;
  std::vector<char> shared;  // contents of the shared memory while another block runs
};

// The thread-local storage of this module, which is where __shared__ variables live, for the calling thread.
struct Span {
  char* data;
  size_t size;
};
thread_local char inside_shared_memory = 0;
Span shared_memory() {
  Span span{&inside_shared_memory, 0};  // taking its address also makes the loader allocate the storage
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* argument) {
        auto* span = static_cast<Span*>(argument);
        auto* begin = static_cast<char*>(module->dlpi_tls_data);
        for (int i = 0; begin && i < module->dlpi_phnum; ++i) {
          const size_t size = module->dlpi_phdr[i].p_memsz;
          if (module->dlpi_phdr[i].p_type == PT_TLS && begin <= span->data && span->data < begin + size) {
            *span = {begin, size};
            return 1;
          }
        }
        return 0;
      },
      &span);
  return span;
}

int schedule = kForward;
uint64_t first_block = 0;
std::string error;

std::unique_ptr<Block> resident[kResidentBlocks];
std::set<std::pair<uint64_t, unsigned>> ready;  // (priority, id); a fiber's id is slot * kMaxThreads + thread
unsigned running;
std::mt19937_64 random_bits;
Block* loaded;  // the block whose shared memory is in place
Span shared_span;
ucontext_t scheduler;
const std::function<void()>* kernel_body;

char* stack_of(unsigned id) {
  static char* stacks = static_cast<char*>(mmap(nullptr, kStackBytes * kMaxThreads * kResidentBlocks,
                                                PROT_READ | PROT_WRITE,
                                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return stacks + kStackBytes * id;
}

Block& block() { return *resident[running / kMaxThreads]; }
Fiber& fiber_of(unsigned id) { return resident[id / kMaxThreads]->fibers[id % kMaxThreads]; }
Fiber& fiber() { return fiber_of(running); }
Warp& warp() { return block().warps[running % kMaxThreads / kWarpThreads]; }

void make_ready(unsigned id) { ready.insert({fiber_of(id).priority, id}); }
void make_unready(unsigned id) { ready.erase({fiber_of(id).priority, id}); }

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer wants to know which stack comes next, and which it came from.
const void* scheduler_stack;
size_t scheduler_stack_bytes;
void leave_for(const void* stack, size_t bytes) { __sanitizer_start_switch_fiber(nullptr, stack, bytes); }
void arrive_in_fiber() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes); }
void arrive_in_scheduler() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
void clear_stack(const void* stack) { __asan_unpoison_memory_region(stack, kStackBytes); }
#else
constexpr void* scheduler_stack = nullptr;
constexpr size_t scheduler_stack_bytes = 0;
void leave_for(const void*, size_t) {}
void arrive_in_fiber() {}
void arrive_in_scheduler() {}
void clear_stack(const void*) {}
#endif

void suspend() {
  leave_for(scheduler_stack, scheduler_stack_bytes);
  swapcontext(&fiber().context, &scheduler);
  arrive_in_fiber();
}

void release_barrier_if_full() {
  Block& b = block();
  if (b.at_barrier < b.alive) return;
  b.at_barrier = 0;
  const unsigned first = running / kMaxThreads * kMaxThreads;
  for (unsigned i = 0; i < b.fibers.size(); ++i)
    if (std::exchange(b.fibers[i].waits_at_barrier, false)) make_ready(first + i);
}

void release_complete_collectives() {
  const unsigned first = running / kWarpThreads * kWarpThreads;
  auto& gathering = warp().gathering;
  for (auto entry = gathering.begin(); entry != gathering.end();) {
    const Lanes& lanes = entry->second.lanes;
    if ((entry->first & warp().alive) != lanes.mask) {
      ++entry;
      continue;
    }
    for (unsigned lane = 0; lane < kWarpThreads; ++lane) {
      if (!(lanes.mask >> lane & 1)) continue;
      fiber_of(first + lane).exchanged = lanes;
      make_ready(first + lane);
    }
    entry = gathering.erase(entry);
  }
}

void run_fiber() {
  arrive_in_fiber();
  (*kernel_body)();
  make_unready(running);
  --block().alive;
  warp().alive &= ~(1u << running % kWarpThreads);
  release_barrier_if_full();
  release_complete_collectives();
  suspend();
}

void make_context(ucontext_t& context, char* stack) {
  clear_stack(stack);
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, run_fiber, 0);
}

uint64_t first_priority(unsigned id) {
  if (schedule == kForward) return id;
  if (schedule == kReverse) return kBehindAll - id;
  return random_bits();
}

void start_block(unsigned slot, uint64_t index) {
  resident[slot] = std::make_unique<Block>();
  Block& started = *resident[slot];
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  started.index = {unsigned(index % gridDim.x), unsigned(index / gridDim.x % gridDim.y),
                   unsigned(index / gridDim.x / gridDim.y)};
  started.alive = threads;
  started.warps.resize((threads + kWarpThreads - 1) / kWarpThreads);
  started.fibers.resize(threads);
  started.shared.assign(shared_span.size, kPoison);
  for (unsigned i = 0; i < threads; ++i) {
    const unsigned id = slot * kMaxThreads + i;
    Fiber& fiber = started.fibers[i];
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.priority = first_priority(id);
    started.warps[i / kWarpThreads].alive |= 1u << i % kWarpThreads;
    make_context(fiber.context, stack_of(id));
    make_ready(id);
  }
}

void resume(unsigned id) {
  running = id;
  if (loaded != &block()) {
    if (loaded) std::copy_n(shared_span.data, shared_span.size, loaded->shared.data());
    std::copy_n(block().shared.data(), shared_span.size, shared_span.data);
    loaded = &block();
  }
  threadIdx = fiber().thread;
  blockIdx = block().index;
  leave_for(stack_of(id), kStackBytes);
  swapcontext(&scheduler, &fiber().context);
  arrive_in_scheduler();
}

void report_deadlock() {
  for (const auto& b : resident) {
    if (!b) continue;
    std::string waiting = std::to_string(b->at_barrier) + " of " + std::to_string(b->alive) + " threads at a barrier";
    for (const Warp& w : b->warps)
      for (const auto& [mask, collective] : w.gathering) waiting += std::string(", a warp at ") + collective.operation;
    error = "deadlock in block " + std::to_string(b->index.x) + ": " + waiting;
  }
}

}  // namespace

cudaError_t launch(dim3 grid, dim3 threads, const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = threads;
  kernel_body = &kernel;
  shared_span = shared_memory();
  loaded = nullptr;
  ready.clear();
  error.clear();
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const uint64_t block_threads = uint64_t(threads.x) * threads.y * threads.z;
  if (blocks == 0 || block_threads == 0 || block_threads > kMaxThreads || grid.x > 0x7fffffff) {
    error = "invalid launch configuration";
    return cudaErrorInvalidConfiguration;
  }

  random_bits.seed(static_cast<uint64_t>(schedule));
  std::vector<uint64_t> order;
  for (uint64_t i = first_block; i < blocks; ++i) order.push_back(i);
  if (schedule == kReverse) std::reverse(order.begin(), order.end());
  if (schedule != kForward && schedule != kReverse) std::shuffle(order.begin(), order.end(), random_bits);

  for (size_t started = 0, finished = 0; error.empty() && finished < order.size();) {
    for (unsigned slot = 0; slot < kResidentBlocks && started < order.size(); ++slot)
      if (!resident[slot]) start_block(slot, order[started++]);
    if (ready.empty()) {
      report_deadlock();
      break;
    }
    resume(ready.begin()->second);
    if (block().alive) continue;
    loaded = nullptr;
    resident[running / kMaxThreads] = nullptr;
    ++finished;
  }
  for (auto& left : resident) left = nullptr;
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

unsigned lane() { return running % kWarpThreads; }

void yield() {
  if (schedule != kForward && schedule != kReverse && random_bits() % 2) {
    make_unready(running);
    fiber().priority = kBehindAll;
    make_ready(running);
  }
  suspend();
}

void barrier() {
  make_unready(running);
  fiber().waits_at_barrier = true;
  ++block().at_barrier;
  release_barrier_if_full();
  suspend();
}

Lanes exchange(unsigned mask, const char* operation, uint64_t bits) {
  if (!(mask >> lane() & 1)) fail("%s: lane %u is not in its own mask %08x", operation, lane(), mask);
  auto [entry, is_first] = warp().gathering.try_emplace(mask, Collective{operation, {}});
  Collective& collective = entry->second;
  if (std::string(collective.operation) != operation)
    fail("lanes of one warp meet at different operations: %s and %s", collective.operation, operation);
  collective.lanes.bits[lane()] = bits;
  collective.lanes.mask |= 1u << lane();
  make_unready(running);
  release_complete_collectives();
  suspend();
  return fiber().exchanged;
}

void fail(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  error = text;
  suspend();
  __builtin_unreachable();  // the launch ends without resuming anyone
}

}  // namespace emulation

// For the tests: the order to run in, the first block to run (to see the far end of a large grid alone), and what went
// wrong since the last call (empty: nothing).
extern "C" void emulation_set_schedule(int schedule) { emulation::schedule = schedule; }
extern "C" void emulation_set_first_block(uint64_t block) { emulation::first_block = block; }
extern "C" const char* emulation_take_error() {
  static std::string taken;
  taken = std::exchange(emulation::error, {});
  return taken.c_str();
}
