// How a kernel is launched, and how a Dtype becomes a C++ type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "hashengine/types.h"

namespace hashengine {

// Through the runtime's function and not through <<<>>>, so that any C++ compiler can read the file: the tests run the
// kernels on the host (tests/emulation). A failure stays in cudaGetLastError for the binding to find.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, arguments...);
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
