// Functions that launch a kernel, ask what the device can do with it, return its dynamic shared memory, and map a Dtype
// to a C++ type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "hashengine/types.h"

namespace hashengine {

inline int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

// An attribute of the current device. The call is assumed to be fast, so its result is not stored between launches.
inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  cudaDeviceGetAttribute(&value, attribute, current_device());
  return value;
}

// Returns make(), or what an earlier call with an equal key returned. The key must contain the device.
template <typename Key, typename Make>
auto remembered(const Key& key, Make make) {
  static std::mutex mutex;
  static std::map<Key, decltype(make())> results;
  const std::lock_guard<std::mutex> guard(mutex);
  const auto found = results.find(key);
  return found != results.end() ? found->second : results.emplace(key, make()).first->second;
}

// The size of the current device's memory, in bytes.
inline int64_t device_memory_bytes() {
  return remembered(current_device(), []() -> int64_t {
    cudaDeviceProp properties{};
    cudaGetDeviceProperties(&properties, current_device());
    return static_cast<int64_t>(properties.totalGlobalMem);
  });
}

// The code that the current device runs for a kernel. A kernel may be compiled for several architectures. A device can
// have a feature that its code does not use: a device of 9.0 runs code for 8.x if the module has no newer code for it.
struct KernelCode {
  int architecture;  // the virtual architecture, such as 90; 0: the module has no code for the device
  int registers;     // per thread
  int64_t static_shared_bytes;
};

template <typename... Parameters>
KernelCode kernel_code(void (*kernel)(Parameters...)) {
  const auto key = std::make_tuple(reinterpret_cast<const void*>(kernel), current_device());
  return remembered(key, [&]() -> KernelCode {
    cudaFuncAttributes compiled{};
    if (cudaFuncGetAttributes(&compiled, kernel) != cudaSuccess) {
      cudaGetLastError();  // otherwise the check after the next launch would report this error
      return {};
    }
    return {compiled.ptxVersion, compiled.numRegs, static_cast<int64_t>(compiled.sharedSizeBytes)};
  });
}

// Code for this virtual architecture and later can use clusters and wait for the previous kernel (cluster.cuh,
// wait_for_previous_kernel). In older code, a cluster is a single block, and nothing waits.
constexpr int kClusterArchitecture = 90;

struct LaunchShape {
  int64_t blocks;
  int threads;               // per block
  int64_t shared_bytes = 0;  // dynamic shared memory per block
  int cluster = 1;           // blocks per cluster; more than 1 only if can_launch_cluster() is true

  // Programmatic dependent launch: the kernel may start before the previous kernel of the stream has finished. The
  // kernel must call wait_for_previous_kernel() before it accesses global memory.
  bool programmatic_launch = false;
};

// By default, a block can use 48 KB of shared memory. This includes static memory (the variables that the kernel
// declares) and dynamic memory. Each kind may take half of the 48 KB, so that launch() can tell from the dynamic size
// alone whether it must request more.
constexpr int64_t kMaxStaticSharedBytes = 24 << 10, kDefaultDynamicSharedBytes = 24 << 10;

// The configuration of a launch. Not copyable, because the configuration refers to the attributes.
template <typename... Parameters>
struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2] = {};

  LaunchConfig(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    if (shape.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
    if (shape.programmatic_launch && kernel_code(kernel).architecture >= kClusterArchitecture) {
      cudaLaunchAttribute& programmatic = attributes[config.numAttrs++];
      programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      programmatic.val.programmaticStreamSerializationAllowed = 1;
    }
    if (shape.shared_bytes > kDefaultDynamicSharedBytes) {
      // Request the device's maximum, not this launch's size. A request applies to every launch of the kernel, and
      // another host thread may be launching it with a larger size.
      const int64_t max_bytes =
          device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kernel_code(kernel).static_shared_bytes;
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(max_bytes));
    }
    constexpr int kMaxPortableCluster = 8;  // blocks; a larger cluster must be requested
    if (shape.cluster > kMaxPortableCluster)
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

// Whether the current device can run the kernel in clusters of this shape. The code that it runs must know clusters,
// and all blocks of a cluster must fit at the same time into the multiprocessors of one group (GPC). A part of a device
// (MIG, or MPS with a share of the multiprocessors) may have smaller groups than the device.
template <typename... Parameters>
bool can_launch_cluster(void (*kernel)(Parameters...), const LaunchShape& shape) {
  if (shape.cluster <= 1) return true;
  if (kernel_code(kernel).architecture < kClusterArchitecture) return false;
  const auto key = std::make_tuple(reinterpret_cast<const void*>(kernel), current_device(), shape.cluster,
                                   shape.threads, shape.shared_bytes);
  return remembered(key, [&] {
    const LaunchConfig<Parameters...> launch_config(kernel, shape, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch_config.config) == cudaSuccess) return clusters > 0;
    cudaGetLastError();  // otherwise the check after the next launch would report this error
    return false;
  });
}

// The number of blocks of this shape that a multiprocessor of the current device runs at a time; at least 1.
template <typename... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), const LaunchShape& shape) {
  const auto key =
      std::make_tuple(reinterpret_cast<const void*>(kernel), current_device(), shape.threads, shape.shared_bytes);
  return remembered(key, [&]() -> int64_t {
    const LaunchConfig<Parameters...> launch_config(kernel, shape, nullptr);  // requests the shared memory
    int blocks = 0;
    if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, shape.threads,
                                                      static_cast<size_t>(shape.shared_bytes)) != cudaSuccess)
      cudaGetLastError();  // otherwise the check after the next launch would report this error
    return blocks > 1 ? blocks : 1;
  });
}

// Launches the kernel. launch() calls a runtime function instead of using <<<>>>, because the tests compile the kernels
// with a C++ compiler and run them on the host (tests/emulation). launch() does not report errors; the binding calls
// C10_CUDA_KERNEL_LAUNCH_CHECK after the launch.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream, Arguments... arguments) {
  const LaunchConfig<Parameters...> launch_config(kernel, shape, stream);
  cudaLaunchKernelEx(&launch_config.config, kernel, arguments...);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  launch(kernel, LaunchShape{blocks, threads}, stream, arguments...);
}

// Lets the next kernel of the stream start early, if its launch is programmatic; this hides the latency of that launch.
// Then waits until the previous kernel has finished and its writes are visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#elif !defined(__CUDACC__)
  emulation::wait_for_previous_kernel();
#endif
}

// The block's dynamic shared memory, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ uint4 dynamic_shared_memory[];
#else
  void* const dynamic_shared_memory = emulation::dynamic_shared_memory();
#endif
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

template <typename T>
struct TypeTag {
  using Type = T;
};

// Calls function(TypeTag<T>()), where T is the C++ type of `dtype`. `dtype` must be a floating-point type.
template <typename Function>
void with_floating_type(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::kFloat64: return function(TypeTag<double>());
    case Dtype::kFloat32: return function(TypeTag<float>());
    case Dtype::kFloat16: return function(TypeTag<__half>());
    case Dtype::kBFloat16: return function(TypeTag<__nv_bfloat16>());
    case Dtype::kBool: return;  // no caller passes kBool
  }
}

}  // namespace hashengine
