// Launching a kernel, its dynamic shared memory, and the C++ type of a Dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "hashengine/types.h"

namespace hashengine {

// An attribute of the current device. The query takes well under a microsecond.
inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Whether the code that this device runs can wait for the previous kernel (griddepcontrol). Code for 8.x cannot, and a
// later device runs code for 8.x if the module contains no newer code.
inline bool supports_programmatic_launch() {
#if defined(__CUDA_ARCH_LIST__)
  constexpr int kCompiledFor[] = {__CUDA_ARCH_LIST__};
#else
  constexpr int kCompiledFor[] = {900};
#endif
  const int64_t device = 100 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
                         10 * device_attribute(cudaDevAttrComputeCapabilityMinor);
  for (const int architecture : kCompiledFor)
    if (900 <= architecture && architecture <= device) return true;
  return false;
}

struct LaunchShape {
  int64_t blocks;
  int threads;               // per block
  int64_t shared_bytes = 0;  // dynamic shared memory per block
  int cluster = 1;           // blocks per cluster; more than 1 needs compute capability 9.0

  // Programmatic dependent launch: the kernel may start before the previous kernel of the stream has finished. It must
  // call wait_for_previous_kernel() before it accesses global memory.
  bool programmatic_launch = false;
};

// Without a request, a block can use 48 KB of shared memory: the variables that the kernel declares and the dynamic
// shared memory together. Here each of them may take half of it, so that the host need not know the size of the other.
constexpr int64_t kMaxStaticSharedBytes = 24 << 10, kDefaultDynamicSharedBytes = 24 << 10;

// Launches the kernel with a runtime function instead of <<<>>>, so that any C++ compiler can compile the file: the
// tests run the kernels on the host (tests/emulation). A failure is reported by the binding, which calls
// cudaGetLastError.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (shape.programmatic_launch && supports_programmatic_launch()) {
    cudaLaunchAttribute& programmatic = attributes[config.numAttrs++];
    programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    programmatic.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.shared_bytes > kDefaultDynamicSharedBytes) {
    // Request the device's maximum, not this launch's size: another host thread may launch the same kernel with a
    // larger size.
    cudaFuncAttributes declared{};
    cudaFuncGetAttributes(&declared, kernel);
    const int64_t max_bytes =
        device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int64_t>(declared.sharedSizeBytes);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(max_bytes));
  }
  constexpr int kMaxPortableCluster = 8;  // blocks; every device with clusters supports this size without a request
  if (shape.cluster > kMaxPortableCluster)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  launch(kernel, LaunchShape{blocks, threads}, stream, arguments...);
}

// Programmatic dependent launch: lets the next kernel start early, then waits until the previous kernel has finished
// and its writes are visible. This hides the latency of the launches.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
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

// Calls function(TypeTag<T>()) with the floating-point type of `dtype`.
template <typename Function>
void with_floating_type(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::kFloat64: return function(TypeTag<double>());
    case Dtype::kFloat32: return function(TypeTag<float>());
    case Dtype::kFloat16: return function(TypeTag<__half>());
    case Dtype::kBFloat16: return function(TypeTag<__nv_bfloat16>());
    case Dtype::kBool: return;  // no caller passes it
  }
}

}  // namespace hashengine
