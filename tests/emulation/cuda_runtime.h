// An emulation of CUDA's execution model on the host. It covers what the kernels of csrc/cuda use, so that tests can
// run them on a machine without a GPU.
//
// Idea. This folder replaces the CUDA toolkit's include folder: a plain C++ compiler compiles the .cu files against
// these headers. Each thread is a fiber that runs until a barrier, a shuffle or an atomic. The schedule then picks the
// next fiber from the resident blocks: three blocks, or all blocks of two clusters. Shared memory contains NaN until it
// is written. The target of an asynchronous copy contains NaN until the thread waits for the copy. A kernel that may
// start early does so before the previous one has written anything. Schedules differ only in the order of execution. A
// result that depends on the schedule, or that is NaN, therefore reveals a missing barrier or wait.
//
// Limits. Not emulated: reordering of memory operations (a missing __threadfence is not detected), bank conflicts,
// time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One instance per block: the emulator swaps the module's thread-local storage whenever it switches blocks. It swaps
// the variables of all kernels, therefore large __shared__ buffers make each switch slow. Dynamic shared memory is not
// swapped.
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// --- the runtime API ---

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
  int numRegs;
};
struct cudaDeviceProp {
  size_t totalGlobalMem;
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

namespace emulation {

cudaError_t get_attributes(cudaFuncAttributes* attributes);
int max_active_clusters(const cudaLaunchConfig_t& config);
// Runs the launches that have not run yet.
void synchronise();
// Returns when the previous kernel of the stream has finished, if the running kernel may have started before that.
void wait_for_previous_kernel();
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);

}  // namespace emulation

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {size_t{16} << 30};
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  emulation::synchronise();
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return emulation::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// Reports, for every kernel, code for the emulated architecture. If that is the device's, each thread has as many
// registers as it can have, from which has_hamming_scan_wgmma() concludes that the kernel is not empty.
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return emulation::get_attributes(attributes);
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t* config) {
  *clusters = emulation::max_active_clusters(*config);
  return cudaSuccess;
}
// A multiprocessor of the emulated device runs two blocks at a time, for every kernel.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return emulation::launch(*config, reinterpret_cast<const void*>(kernel), [=] { kernel(arguments...); });
}

// --- the device API ---

namespace emulation {

struct Lanes {
  uint64_t bits[32];  // the value of each lane
  unsigned mask;      // the lanes that have arrived
};

void block_barrier();
void yield();
// The dynamic shared memory of the running block.
void* dynamic_shared_memory();
// A collective operation of a warp: waits for all lanes of the mask that have not exited, and returns the values that
// they passed as `bits`. Fails if the lanes arrive at different operations.
Lanes gather_lanes(unsigned mask, const char* operation, uint64_t bits);
// Ends the launch with an error. Does not return.
[[noreturn]] void fail(const char* format, ...);
unsigned lane();

template <typename T>
T shuffle(unsigned mask, const char* operation, T value, unsigned source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Lanes lanes = gather_lanes(mask, operation, bits);
  if (!(lanes.mask >> source & 1))
    fail("%s: lane %u reads lane %u, which does not participate", operation, lane(), source);
  std::memcpy(&value, &lanes.bits[source], sizeof(T));
  return value;
}

// Only for integers: kernels must not add floats with atomics, because the result would depend on the order.
template <typename T, typename Update>
std::enable_if_t<std::is_integral_v<T>, T> atomic(T* address, Update update) {
  yield();
  const T old = *address;
  *address = update(old);
  yield();
  return old;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(); }
inline void __threadfence() {}
inline void __syncwarp(unsigned mask = ~0u) { emulation::gather_lanes(mask, "__syncwarp", 0); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::shuffle(mask, "__shfl_sync", value, unsigned(source) % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return emulation::shuffle(mask, "__shfl_xor_sync", value, (emulation::lane() ^ unsigned(distance)) % 32);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  const unsigned source = emulation::lane() + distance;
  return emulation::shuffle(mask, "__shfl_down_sync", value, source < 32 ? source : emulation::lane());
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  const unsigned lane = emulation::lane();
  return emulation::shuffle(mask, "__shfl_up_sync", value, distance <= lane ? lane - distance : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const emulation::Lanes lanes = emulation::gather_lanes(mask, "__ballot_sync", predicate != 0);
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i) ballot |= (lanes.mask >> i & 1 & unsigned(lanes.bits[i])) << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  static_assert(std::is_integral_v<T>);
  const emulation::Lanes lanes = emulation::gather_lanes(mask, "__match_any_sync", uint64_t(value));
  unsigned peers = 0;
  for (unsigned i = 0; i < 32; ++i) peers |= unsigned(lanes.mask >> i & 1 && lanes.bits[i] == uint64_t(value)) << i;
  return peers;
}

template <typename T>
T atomicAdd(T* address, T value) {
  return emulation::atomic(address, [=](T old) { return T(old + value); });
}
template <typename T>
T atomicMin(T* address, T value) {
  return emulation::atomic(address, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicMax(T* address, T value) {
  return emulation::atomic(address, [=](T old) { return value > old ? value : old; });
}

// --- loads and stores with cache hints, bit functions, fast math (more accurate here than on a GPU) ---

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

using std::max;
using std::min;
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(unsigned(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
