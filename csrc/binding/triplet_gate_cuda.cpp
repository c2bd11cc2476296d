#include <torch/library.h>

#include "binding/cuda.h"
#include "binding/triplet_gate.h"

namespace hashengine::binding {
namespace {

at::Tensor forward_cuda(const at::Tensor& x, const at::Tensor& map_cw, const at::Tensor& map_hc,
                        const std::optional<at::Tensor>& map_hw) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return triplet_gate_forward(x, map_cw, map_hc, map_hw, [](const TripletGateForward& params) {
    launch_triplet_gate_forward(params, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_cuda(const at::Tensor& grad_y, const at::Tensor& x,
                                                                         const at::Tensor& map_cw,
                                                                         const at::Tensor& map_hc,
                                                                         const std::optional<at::Tensor>& map_hw) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return triplet_gate_backward(grad_y, x, map_cw, map_hc, map_hw, [&](const TripletGateBackward& params) {
    const at::Tensor workspace = cuda_scratch(x, triplet_gate_backward_workspace_bytes(params.shape));
    launch_triplet_gate_backward(params, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

TORCH_LIBRARY_IMPL(hashengine, CUDA, library) {
  library.impl("triplet_gate", forward_cuda);
  library.impl("triplet_gate_backward", backward_cuda);
}

}  // namespace
}  // namespace hashengine::binding
