// The checks and allocations of greedy_sign that every device shares; a device adds the call of its kernel.
#pragma once

#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>

#include "check.h"
#include "hashengine/greedy_sign.h"

namespace hashengine::binding {

// launch(const GreedySignForward&) runs the kernel.
template <typename Launch>
std::tuple<at::Tensor, at::Tensor> greedy_sign_forward(const at::Tensor& u, double alpha, Launch launch) {
  const Dtype dtype = floating_dtype(u, "greedy_sign", "u");
  const at::Tensor u_dense = dense(u);
  at::Tensor b = at::empty_like(u_dense);
  at::Tensor penalty = at::empty({}, u.options().dtype(sum_dtype(u.scalar_type())));
  launch({u_dense.const_data_ptr(), b.mutable_data_ptr(), penalty.mutable_data_ptr(), u.numel(), alpha, dtype});
  return {b, penalty};
}

template <typename Launch>
at::Tensor greedy_sign_backward(const std::optional<at::Tensor>& grad_b, const std::optional<at::Tensor>& grad_penalty,
                                const at::Tensor& u, double alpha, Launch launch) {
  const Dtype dtype = floating_dtype(u, "greedy_sign_backward", "u");
  const at::Tensor u_dense = dense(u);
  at::Tensor grad_u = at::empty_like(u_dense);
  at::Tensor grad_b_dense;
  if (grad_b) {
    TORCH_CHECK_VALUE(
        grad_b->sizes() == u.sizes() && grad_b->scalar_type() == u.scalar_type() && grad_b->device() == u.device(),
        "greedy_sign_backward: grad_b must match u (", u.scalar_type(), u.sizes(), " on ", u.device(), "), got ",
        grad_b->scalar_type(), grad_b->sizes(), " on ", grad_b->device());
    grad_b_dense = like_layout_of(u_dense, *grad_b);
  }
  if (grad_penalty) {
    TORCH_CHECK_VALUE(grad_penalty->numel() == 1 && grad_penalty->scalar_type() == sum_dtype(u.scalar_type()) &&
                          grad_penalty->device() == u.device(),
                      "greedy_sign_backward: grad_penalty must be one ", sum_dtype(u.scalar_type()), " on ", u.device(),
                      ", got ", grad_penalty->scalar_type(), grad_penalty->sizes(), " on ", grad_penalty->device());
  }
  launch({grad_b ? grad_b_dense.const_data_ptr() : nullptr, grad_penalty ? grad_penalty->const_data_ptr() : nullptr,
          u_dense.const_data_ptr(), grad_u.mutable_data_ptr(), u.numel(), alpha, dtype});
  return grad_u;
}

}  // namespace hashengine::binding
