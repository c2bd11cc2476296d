// How a kernel is launched, its dynamic shared memory, and how a Dtype becomes a C++ type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "hashengine/types.h"

namespace hashengine {

// A limit of the current device; a query costs well under a microsecond.
inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Whether the code that runs on this device can wait for the last kernel: code for 8.x, which later devices may have
// to do with, cannot.
inline bool can_come_early() {
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

// How many blocks of how many threads, the bytes of dynamic shared memory that each block gets, how many blocks form a
// cluster (1: none; from compute capability 9.0 on), and whether the kernel's blocks may come before the last kernel of
// the stream has ended. Such a kernel calls wait_for_last_kernel() before it touches memory.
struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;
  bool comes_early = false;
};

// A block gets 48 KB for nothing, and the kernel's own declarations count among them: of dynamic shared memory so much
// is had without asking, beside 24 KB that a kernel may declare.
constexpr int64_t kFreeSharedBytes = 24 << 10, kMostDeclaredBytes = 24 << 10;

// Through the runtime's function and not through <<<>>>, so that any C++ compiler can read the file: the tests run the
// kernels on the host (tests/emulation). A failure stays in cudaGetLastError for the binding to find.
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
  if (shape.comes_early && can_come_early()) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  constexpr int kPortableCluster = 8;  // blocks, had without asking
  if (shape.shared_bytes > kFreeSharedBytes) {
    // All that there is, and not what this launch needs: another thread may be launching the same kernel with more.
    cudaFuncAttributes declared{};
    cudaFuncGetAttributes(&declared, kernel);
    const int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - int64_t(declared.sharedSizeBytes);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
  }
  if (shape.cluster > kPortableCluster) cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  launch(kernel, LaunchShape{blocks, threads}, stream, arguments...);
}

// Lets the next kernel's blocks come, if they come early, and waits until the last kernel has ended and what it wrote
// is there: so its end, this one's launch and the coming of its blocks overlap.
__device__ __forceinline__ void wait_for_last_kernel() {
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

// Calls function(TypeTag<T>()) with the floating-point type that dtype names.
template <typename Function>
void with_floating_type(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::kFloat64: return function(TypeTag<double>());
    case Dtype::kFloat32: return function(TypeTag<float>());
    case Dtype::kFloat16: return function(TypeTag<__half>());
    case Dtype::kBFloat16: return function(TypeTag<__nv_bfloat16>());
    case Dtype::kBool: return;  // the bindings refuse it
  }
}

}  // namespace hashengine
