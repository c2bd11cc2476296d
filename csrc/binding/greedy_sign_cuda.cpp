#include <torch/library.h>

#include "binding/cuda.h"
#include "binding/greedy_sign.h"

namespace hashengine::binding {
namespace {

std::tuple<at::Tensor, at::Tensor> forward_cuda(const at::Tensor& u, double alpha) {
  const c10::cuda::CUDAGuard device_guard(u.device());
  return greedy_sign_forward(u, alpha, [&](const GreedySignForward& params) {
    const at::Tensor workspace = cuda_scratch(u, greedy_sign_workspace_bytes(params.numel));
    launch_greedy_sign_forward(params, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

at::Tensor backward_cuda(const std::optional<at::Tensor>& grad_b, const std::optional<at::Tensor>& grad_penalty,
                         const at::Tensor& u, double alpha) {
  const c10::cuda::CUDAGuard device_guard(u.device());
  return greedy_sign_backward(grad_b, grad_penalty, u, alpha, [](const GreedySignBackward& params) {
    launch_greedy_sign_backward(params, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

TORCH_LIBRARY_IMPL(hashengine, CUDA, library) {
  library.impl("greedy_sign", forward_cuda);
  library.impl("greedy_sign_backward", backward_cuda);
}

}  // namespace
}  // namespace hashengine::binding
