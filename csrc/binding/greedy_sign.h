// greedy_sign: the checks and allocations that all devices share. Each device adds the call of its kernel.
#pragma once

#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>

#include "binding/check.h"
#include "hashengine/greedy_sign.h"

namespace hashengine::binding {

inline Dtype check_greedy_sign(const char* op, const at::Tensor& u, double alpha) {
  const Dtype dtype = check_floating(op, "u", u);
  check_at_least(op, "alpha", alpha, 0);
  return dtype;
}

// launch(const GreedySignForward&) runs the kernel.
template <typename Launch>
std::tuple<at::Tensor, at::Tensor> greedy_sign_forward(const at::Tensor& u, double alpha, Launch launch) {
  const Dtype dtype = check_greedy_sign("greedy_sign", u, alpha);
  const at::Tensor u_dense = dense(u);
  at::Tensor b = at::empty_like(u_dense);
  at::Tensor penalty = at::empty({}, u.options().dtype(wide_dtype(u)));
  launch({u_dense.const_data_ptr(), b.mutable_data_ptr(), penalty.mutable_data_ptr(), u.numel(), alpha, dtype});
  return {b, penalty};
}

// launch(const GreedySignBackward&) runs the kernel.
template <typename Launch>
at::Tensor greedy_sign_backward(const std::optional<at::Tensor>& grad_b, const std::optional<at::Tensor>& grad_penalty,
                                const at::Tensor& u, double alpha, Launch launch) {
  const char* op = "greedy_sign_backward";
  const Dtype dtype = check_greedy_sign(op, u, alpha);
  const at::Tensor u_dense = dense(u);
  at::Tensor grad_u = at::empty_like(u_dense);
  at::Tensor grad_b_dense;
  if (grad_b) {
    check_gradient(op, "grad_b", *grad_b, u);
    grad_b_dense = like_layout_of(u_dense, *grad_b);
  }
  if (grad_penalty) {
    TORCH_CHECK_VALUE(grad_penalty->numel() == 1 && grad_penalty->scalar_type() == wide_dtype(u) &&
                          grad_penalty->device() == u.device(),
                      op, ": grad_penalty must be one value of ", dtype_name(wide_dtype(u)), " on ", u.device(),
                      ", got ", dtype_name(*grad_penalty), " ", grad_penalty->sizes(), " on ", grad_penalty->device());
  }
  launch({grad_b ? grad_b_dense.const_data_ptr() : nullptr, grad_penalty ? grad_penalty->const_data_ptr() : nullptr,
          u_dense.const_data_ptr(), grad_u.mutable_data_ptr(), u.numel(), alpha, dtype});
  return grad_u;
}

}  // namespace hashengine::binding
