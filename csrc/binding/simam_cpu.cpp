#include <torch/library.h>

#include "binding/simam.h"

namespace hashengine::binding {
namespace {

std::tuple<at::Tensor, at::Tensor> forward_cpu(const at::Tensor& x, double lam) {
  return simam_forward(
      x, lam, [](const SimamForward& params) { simam_forward_cpu(params, simd_level(), torch_thread_pool()); });
}

at::Tensor backward_cpu(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& stats, double lam) {
  return simam_backward(grad_y, x, stats, lam, [](const SimamBackward& params) {
    simam_backward_cpu(params, simd_level(), torch_thread_pool());
  });
}

TORCH_LIBRARY_IMPL(hashengine, CPU, library) {
  library.impl("simam", forward_cpu);
  library.impl("simam_backward", backward_cpu);
}

}  // namespace
}  // namespace hashengine::binding
