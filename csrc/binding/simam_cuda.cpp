#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "simam.h"

namespace hashengine::binding {
namespace {

// Freed before the kernels have run: the allocator hands it out again in this stream's order only.
at::Tensor workspace_like(const at::Tensor& x, int64_t bytes) {
  return at::empty({bytes}, x.options().dtype(at::kByte));
}

std::tuple<at::Tensor, at::Tensor> forward_cuda(const at::Tensor& x, double lam) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return simam_forward(x, lam, [&](const SimamForward& params) {
    const at::Tensor workspace = workspace_like(x, simam_forward_workspace_bytes(params.shape));
    launch_simam_forward(params, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

at::Tensor backward_cuda(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& stats, double lam) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return simam_backward(grad_y, x, stats, lam, [&](const SimamBackward& params) {
    const at::Tensor workspace = workspace_like(x, simam_backward_workspace_bytes(params.shape));
    launch_simam_backward(params, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

TORCH_LIBRARY_IMPL(hashengine, CUDA, library) {
  library.impl("simam", forward_cuda);
  library.impl("simam_backward", backward_cuda);
}

}  // namespace
}  // namespace hashengine::binding
