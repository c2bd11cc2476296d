// Functions that launch a kernel, return its dynamic shared memory, and map a Dtype to a C++ type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "hashengine/types.h"

namespace hashengine {

// An attribute of the current device. The call is assumed to be fast, so its result is not stored between launches.
inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Whether the kernel can wait for the previous kernel (the instruction griddepcontrol) on the current device. A kernel
// may be compiled for several architectures. The compiler emits that instruction only in code for the virtual
// architecture 9.0 and later. A device of 9.0 or later is not enough: it runs code for 8.x if the module has no newer
// code for it.
template <typename... Parameters>
bool supports_programmatic_launch(void (*kernel)(Parameters...)) {
  cudaFuncAttributes compiled{};
  return cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess && compiled.ptxVersion >= 90;
}

struct LaunchShape {
  int64_t blocks;
  int threads;               // per block
  int64_t shared_bytes = 0;  // dynamic shared memory per block
  int cluster = 1;           // blocks per cluster; more than 1 needs compute capability 9.0 or later

  // Programmatic dependent launch: the kernel may start before the previous kernel of the stream has finished. The
  // kernel must call wait_for_previous_kernel() before it accesses global memory.
  bool programmatic_launch = false;
};

// By default, a block can use 48 KB of shared memory. This includes static memory (the variables that the kernel
// declares) and dynamic memory. Each kind may take half of the 48 KB, so that launch() can tell from the dynamic size
// alone whether it must request more.
constexpr int64_t kMaxStaticSharedBytes = 24 << 10, kDefaultDynamicSharedBytes = 24 << 10;

// Launches the kernel. launch() calls a runtime function instead of using <<<>>>, because the tests compile the kernels
// with a C++ compiler and run them on the host (tests/emulation). launch() does not report errors; the binding calls
// C10_CUDA_KERNEL_LAUNCH_CHECK after the launch.
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
  if (shape.programmatic_launch && supports_programmatic_launch(kernel)) {
    cudaLaunchAttribute& programmatic = attributes[config.numAttrs++];
    programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    programmatic.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.shared_bytes > kDefaultDynamicSharedBytes) {
    // Request the device's maximum, not this launch's size. A request applies to every launch of the kernel, and
    // another host thread may be launching it with a larger size.
    cudaFuncAttributes declared{};
    cudaFuncGetAttributes(&declared, kernel);
    const int64_t max_bytes =
        device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int64_t>(declared.sharedSizeBytes);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(max_bytes));
  }
  constexpr int kMaxPortableCluster = 8;  // blocks; a larger cluster must be requested
  if (shape.cluster > kMaxPortableCluster)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchKernelEx(&config, kernel, arguments...);
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
