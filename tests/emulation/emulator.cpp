// The emulator behind cuda_runtime.h: the device, launches, fibers and their schedule.

#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <random>
#include <set>
#include <tuple>
#include <utility>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

std::vector<std::unique_ptr<Block>> resident;
unsigned running;
unsigned cluster_size;
size_t dynamic_bytes;

namespace {

constexpr unsigned kMaxSlots = 2 * kMaxClusterBlocks;
constexpr size_t kStackBytes = 128 << 10;
// The dynamic shared memory that a launch can use without cudaFuncSetAttribute. CUDA permits 48 KB including the
// variables that the kernel declares. Their size is unknown here, so half of the 48 KB is reserved for them.
constexpr size_t kDefaultSharedBytes = 24 << 10;

// A fiber emulates a thread. The ready fiber with the smallest priority value runs. A schedule number of 2 or more is
// the seed of random priorities. Under such a schedule, a fiber also gets the largest priority value with probability
// 1/2 before and after each atomic, so that other ready fibers overtake it.
enum Schedule { kForward = 0, kReverse = 1 };
constexpr uint64_t kLast = ~uint64_t(0);

int schedule = kForward;
uint64_t first_block = 0, end_block = UINT64_MAX;
int capability = 90;
int code_architecture = 90;     // of the code that the device runs
unsigned largest_cluster = 16;  // blocks; more do not fit into a group of multiprocessors
int multiprocessors = 4;        // few, so that small inputs fill the device
std::string error;

std::set<std::pair<uint64_t, unsigned>> ready;  // (priority, id)
std::mt19937_64 random_bits;
ucontext_t scheduler;
const std::function<void()>* kernel_body;

bool is_random() { return schedule != kForward && schedule != kReverse; }

// A kernel that waits for the previous one is suspended while that one runs. Its fibers need stacks of their own.
size_t depth = 0;  // the number of suspended kernels

char* stack_of(unsigned id) {
  static std::vector<char*> stacks;
  if (stacks.size() <= depth)
    stacks.push_back(static_cast<char*>(mmap(nullptr, kStackBytes * kMaxThreads * kMaxSlots, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  return stacks[depth] + kStackBytes * id;
}

// Launches that have not run yet, in their order. A launch runs when it must: when the next launch may not start early,
// when a kernel waits for it, or when the host synchronises. A kernel that may start early therefore runs before the
// previous one as far as it can without waiting.
struct Launch {
  dim3 grid, threads;
  unsigned cluster_size;
  size_t dynamic_bytes;
  std::function<void()> body;
};
std::deque<Launch> launches;

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer requires these calls around each switch between stacks.
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

void run_fiber() {
  arrive_in_fiber();
  (*kernel_body)();
  if (block().alive == 1) check_products();
  if (fiber().cluster_barrier != ClusterBarrier::kNone) fail("a thread exits before it waits for the cluster");
  make_unready(running);
  --block().alive;
  warp().alive &= ~(1u << running % kWarpThreads);
  release_barriers();
  release_collectives();
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
  if (schedule == kReverse) return kLast - id;
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
  allocate_shared_memory(started);
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
  if (!std::exchange(block().has_started, true)) begin_shared_memory(block());
  swap_in(block());
  threadIdx = fiber().thread;
  blockIdx = block().index;
  leave_for(stack_of(id), kStackBytes);
  swapcontext(&scheduler, &fiber().context);
  arrive_in_scheduler();
  if (!block().alive) end_shared_memory(block());
}

// If all blocks of the cluster that starts at slot `first` have finished, frees their slots and returns true.
bool free_if_finished(unsigned first) {
  for (unsigned slot = first; slot < first + cluster_size; ++slot)
    if (resident[slot]->alive) return false;
  for (unsigned slot = first; slot < first + cluster_size; ++slot) resident[slot] = nullptr;
  return true;
}

// Returns the first block of each cluster, in the order in which the clusters start.
std::vector<uint64_t> start_order(uint64_t blocks) {
  random_bits.seed(static_cast<uint64_t>(schedule));
  std::vector<uint64_t> order;
  for (uint64_t i = first_block / cluster_size * cluster_size; i < std::min(blocks, end_block); i += cluster_size)
    order.push_back(i);
  if (schedule == kReverse) std::reverse(order.begin(), order.end());
  if (is_random()) std::shuffle(order.begin(), order.end(), random_bits);
  return order;
}

void run_last();

// Runs the previous kernels if the resident blocks wait for them, and makes the waiting fibers ready.
bool run_previous() {
  bool is_awaited = false;
  for (const auto& b : resident)
    for (size_t i = 0; b && i < b->fibers.size(); ++i) is_awaited |= b->fibers[i].wait == Wait::kPrevious;
  if (!is_awaited) return false;
  if (!launches.empty()) {
    swap_out();
    const auto state = std::make_tuple(gridDim, blockDim, cluster_size, dynamic_bytes, kernel_body, random_bits);
    std::vector<std::unique_ptr<Block>> suspended = std::move(resident);
    resident.clear();
    ++depth;
    while (!launches.empty()) run_last();
    --depth;
    resident = std::move(suspended);
    std::tie(gridDim, blockDim, cluster_size, dynamic_bytes, kernel_body, random_bits) = state;
  }
  for (unsigned slot = 0; slot < resident.size(); ++slot)
    for (size_t i = 0; resident[slot] && i < resident[slot]->fibers.size(); ++i) {
      Fiber& waiting = resident[slot]->fibers[i];
      if (waiting.wait != Wait::kPrevious) continue;
      waiting.wait = Wait::kNone;
      make_ready(slot * kMaxThreads + unsigned(i));
    }
  return true;
}

void run(uint64_t blocks) {
  const std::vector<uint64_t> order = start_order(blocks);
  resident.resize(cluster_size == 1 ? 3 : 2 * cluster_size);
  for (size_t started = 0, finished = 0; error.empty() && finished < order.size();) {
    for (unsigned first = 0; first < resident.size() && started < order.size(); first += cluster_size) {
      if (resident[first]) continue;
      for (unsigned rank = 0; rank < cluster_size; ++rank) start_block(first + rank, order[started] + rank);
      ++started;
    }
    if (ready.empty() && run_previous()) continue;
    if (ready.empty()) {
      for (const auto& b : resident)
        if (b && b->alive && error.empty()) error = "deadlock in " + describe_waiting(*b);
      break;
    }
    resume(ready.begin()->second);
    finished += free_if_finished(running / kMaxThreads / cluster_size * cluster_size);
  }
  resident.clear();
  ready.clear();
  swapped_in = nullptr;
}

// --- the limits of a launch ---

std::map<std::pair<const void*, cudaFuncAttribute>, int> attributes;

int attribute(const void* kernel, cudaFuncAttribute name, int default_value) {
  const auto found = attributes.find({kernel, name});
  return found == attributes.end() ? default_value : found->second;
}

size_t max_shared_bytes() {
  switch (capability) {
    case 80: return 163 << 10;
    case 90:
    case 100: return 227 << 10;
    default: return 99 << 10;
  }
}

unsigned requested_cluster_size(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  return 1;
}

bool may_start_early(const cudaLaunchConfig_t& config) {
  return std::any_of(config.attrs, config.attrs + config.numAttrs, [](const cudaLaunchAttribute& attribute) {
    return attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization;
  });
}

// Returns a description of what is invalid in the configuration, or an empty string if it is valid.
std::string find_error(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, threads = config.blockDim;
  const unsigned cluster = requested_cluster_size(config);
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff)
    return "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z);
  if (may_start_early(config) && code_architecture < 90) return "the kernel may start early, but its code cannot wait";
  const uint64_t block_threads = uint64_t(threads.x) * threads.y * threads.z;
  if (!block_threads || block_threads > kMaxThreads) return std::to_string(block_threads) + " threads per block";
  if (cluster != 1) {
    if (capability < 90) return "clusters need compute capability 9.0";
    if (code_architecture < 90) return "clusters need code for 9.0";
    if (!cluster || grid.x % cluster)
      return "the grid is not a multiple of the cluster size " + std::to_string(cluster);
    const bool is_allowed = attribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 0);
    if (cluster > (is_allowed ? kMaxClusterBlocks : 8)) return std::to_string(cluster) + " blocks per cluster";
    if (cluster > largest_cluster) return std::to_string(cluster) + " blocks of a cluster do not run at the same time";
  }
  const size_t bytes = config.dynamicSmemBytes;
  if (bytes > size_t(attribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kDefaultSharedBytes)))
    return std::to_string(bytes) + " bytes of dynamic shared memory that were not requested";
  return "";
}

void run_last() {
  const Launch launch = std::move(launches.back());
  launches.pop_back();
  if (!error.empty()) return;
  gridDim = launch.grid;
  blockDim = launch.threads;
  cluster_size = launch.cluster_size;
  dynamic_bytes = launch.dynamic_bytes;
  kernel_body = &launch.body;
  run(uint64_t(gridDim.x) * gridDim.y * gridDim.z);
}

}  // namespace

void synchronise() {
  while (!launches.empty()) run_last();
}

void wait_for_previous_kernel() {
  if (launches.empty()) return;
  make_unready(running);
  fiber().wait = Wait::kPrevious;
  suspend();
}

void make_ready(unsigned id) { ready.insert({fiber_of(id).priority, id}); }
void make_unready(unsigned id) { ready.erase({fiber_of(id).priority, id}); }

void suspend() {
  leave_for(scheduler_stack, scheduler_stack_bytes);
  swapcontext(&fiber().context, &scheduler);
  arrive_in_fiber();
}

void yield() {
  if (is_random() && random_bits() % 2) {
    make_unready(running);
    fiber().priority = kLast;
    make_ready(running);
  }
  suspend();
}

void fail(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  error = text;
  suspend();
  __builtin_unreachable();  // after an error the launch ends without resuming any fiber
}

cudaError_t get_attributes(cudaFuncAttributes* attributes) {
  attributes->sharedSizeBytes = 1;
  attributes->ptxVersion = code_architecture;
  attributes->numRegs = code_architecture == capability ? 255 : 32;
  return cudaSuccess;
}

int max_active_clusters(const cudaLaunchConfig_t& config) {
  return code_architecture >= 90 && requested_cluster_size(config) <= largest_cluster;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute name, int value) {
  if (name == cudaFuncAttributeMaxDynamicSharedMemorySize && size_t(value) > max_shared_bytes())
    return cudaErrorInvalidValue;
  attributes[{kernel, name}] = value;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body) {
  if (!error.empty()) return cudaErrorLaunchFailure;  // an earlier launch failed; emulation_take_error() clears this
  const std::string config_error = find_error(config, kernel);
  if (!config_error.empty()) {
    error = "invalid launch configuration: " + config_error;
    return cudaErrorInvalidConfiguration;
  }
  if (!may_start_early(config)) synchronise();
  launches.push_back({config.gridDim, config.blockDim, requested_cluster_size(config), config.dynamicSmemBytes, body});
  return cudaSuccess;
}

}  // namespace emulation

cudaError_t cudaGetDevice(int* device) {
  // Each kind of device has a number of its own, because kernels remember what they ask about a device.
  *device = (emulation::capability * 1000 + emulation::code_architecture) * 100 + int(emulation::largest_cluster);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulation::multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = emulation::capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = emulation::capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(emulation::max_shared_bytes()); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

// For the tests. The functions set the schedule, the first block to run (to test only the end of a large grid), and the
// device: its compute capability, the architecture of the code that it runs, the blocks of the largest cluster, and the
// number of multiprocessors. emulation_take_error returns and clears the error, or
// returns an empty string if there is none.
extern "C" void emulation_set_schedule(int schedule) { emulation::schedule = schedule; }
extern "C" void emulation_set_blocks(uint64_t first, uint64_t end) {
  emulation::first_block = first;
  emulation::end_block = end;
}
extern "C" void emulation_set_capability(int capability) {
  emulation::capability = emulation::code_architecture = capability;
}
extern "C" void emulation_set_code_architecture(int architecture) { emulation::code_architecture = architecture; }
extern "C" void emulation_set_largest_cluster(int blocks) { emulation::largest_cluster = unsigned(blocks); }
extern "C" void emulation_set_multiprocessors(int count) { emulation::multiprocessors = count; }
extern "C" void emulation_synchronise() { emulation::synchronise(); }
extern "C" const char* emulation_take_error() {
  emulation::synchronise();
  static std::string taken;
  taken = std::exchange(emulation::error, {});
  return taken.c_str();
}
