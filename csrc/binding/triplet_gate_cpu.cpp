#include <torch/library.h>

#include "binding/triplet_gate.h"

namespace hashengine::binding {
namespace {

at::Tensor forward_cpu(const at::Tensor& x, const at::Tensor& map_cw, const at::Tensor& map_hc,
                       const std::optional<at::Tensor>& map_hw) {
  return triplet_gate_forward(x, map_cw, map_hc, map_hw, [](const TripletGateForward& params) {
    triplet_gate_forward_cpu(params, simd_level(), torch_thread_pool());
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_cpu(const at::Tensor& grad_y, const at::Tensor& x,
                                                                        const at::Tensor& map_cw,
                                                                        const at::Tensor& map_hc,
                                                                        const std::optional<at::Tensor>& map_hw) {
  return triplet_gate_backward(grad_y, x, map_cw, map_hc, map_hw, [](const TripletGateBackward& params) {
    triplet_gate_backward_cpu(params, simd_level(), torch_thread_pool());
  });
}

TORCH_LIBRARY_IMPL(hashengine, CPU, library) {
  library.impl("triplet_gate", forward_cpu);
  library.impl("triplet_gate_backward", backward_cpu);
}

}  // namespace
}  // namespace hashengine::binding
