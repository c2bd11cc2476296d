#include <torch/library.h>

#include "binding/greedy_sign.h"

namespace hashengine::binding {
namespace {

std::tuple<at::Tensor, at::Tensor> forward_cpu(const at::Tensor& u, double alpha) {
  return greedy_sign_forward(u, alpha, [](const GreedySignForward& params) {
    check_no_nan("greedy_sign", "u", greedy_sign_forward_cpu(params, simd_level(), torch_thread_pool()));
  });
}

at::Tensor backward_cpu(const std::optional<at::Tensor>& grad_b, const std::optional<at::Tensor>& grad_penalty,
                        const at::Tensor& u, double alpha) {
  return greedy_sign_backward(grad_b, grad_penalty, u, alpha, [](const GreedySignBackward& params) {
    greedy_sign_backward_cpu(params, simd_level(), torch_thread_pool());
  });
}

TORCH_LIBRARY_IMPL(hashengine, CPU, library) {
  library.impl("greedy_sign", forward_cpu);
  library.impl("greedy_sign_backward", backward_cpu);
}

}  // namespace
}  // namespace hashengine::binding
