// CUDA's execution model on the host, enough of it to run the kernels of csrc/cuda in tests on a machine without a GPU.
//
// This folder stands in for the toolkit's include folder: the .cu files, compiled by a plain C++ compiler, find here
// the names that they use. A thread is a fiber that runs until it waits (a barrier, a shuffle, an atomic); then the
// schedule picks another, of the same block or of another that is resident. Schedules differ in the order only, so a
// result that changes with the schedule, or a NaN from poisoned memory, is a missing barrier.
//
// Not modelled: the reordering of memory operations (a missing __threadfence goes unseen) and time.
#pragma once

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
// One copy a block: the emulator swaps the module's thread-local storage whenever it switches blocks.
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulation {

struct Lanes {
  uint64_t bits[32];  // what each lane brought
  unsigned mask;      // the lanes that came
};

cudaError_t launch(dim3 grid, dim3 block, const std::function<void()>& kernel);
void barrier();
void yield();
// Waits for all lanes of the mask that have not exited; they must all be at the same operation.
Lanes exchange(unsigned mask, const char* operation, uint64_t bits);
// Ends the launch with an error; does not return.
[[noreturn]] void fail(const char* format, ...);
unsigned lane();

template <typename T>
T shuffle(unsigned mask, const char* operation, T value, unsigned source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Lanes lanes = exchange(mask, operation, bits);
  if (!(lanes.mask >> source & 1)) fail("%s: lane %u reads lane %u, which takes no part", operation, lane(), source);
  std::memcpy(&value, &lanes.bits[source], sizeof(T));
  return value;
}

}  // namespace emulation

// Synchronous, as a stream with nothing in it.
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return emulation::launch(config->gridDim, config->blockDim, [=] { kernel(arguments...); });
}

inline void __syncthreads() { emulation::barrier(); }
inline void __threadfence() {}
inline void __syncwarp(unsigned mask = ~0u) { emulation::exchange(mask, "__syncwarp", 0); }

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

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const emulation::Lanes lanes = emulation::exchange(mask, "__ballot_sync", predicate != 0);
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i) ballot |= (lanes.mask >> i & 1 & unsigned(lanes.bits[i])) << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// On integers only: an order-dependent atomic sum of floats is not something the kernels may do.
template <typename T, typename = std::enable_if_t<std::is_integral_v<T>>>
T atomicAdd(T* address, T value) {
  emulation::yield();
  const T old = *address;
  *address = old + value;
  emulation::yield();
  return old;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}
