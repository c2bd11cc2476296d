// Headers and functions that all CUDA bindings need: torch's device guard, current stream and launch check, and scratch
// memory.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace hashengine::binding {

// Uninitialised scratch memory on the device of `x`. The caller may free it before the kernels have used it: torch's
// allocator reuses the memory only for later work in the same stream.
inline at::Tensor cuda_scratch(const at::Tensor& x, int64_t bytes) {
  return at::empty({bytes}, x.options().dtype(at::kByte));
}

}  // namespace hashengine::binding
