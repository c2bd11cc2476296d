#include <torch/library.h>

#include "binding/cuda.h"
#include "binding/simam.h"

namespace hashengine::binding {
namespace {

std::tuple<at::Tensor, at::Tensor> forward_cuda(const at::Tensor& x, double lam) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return simam_forward(x, lam, [&](const SimamForward& params) {
    const at::Tensor workspace = cuda_scratch(x, simam_forward_workspace_bytes(params.shape));
    launch_simam_forward(params, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

at::Tensor backward_cuda(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& stats, double lam) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return simam_backward(grad_y, x, stats, lam, [&](const SimamBackward& params) {
    const at::Tensor workspace = cuda_scratch(x, simam_backward_workspace_bytes(params.shape));
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
