// simam: the checks and allocations that all devices share. Each device adds the call of its kernel.
#pragma once

#include <ATen/ops/empty.h>

#include <tuple>

#include "binding/feature_map.h"
#include "hashengine/simam.h"

namespace hashengine::binding {

// The gradient divides by the square of lam, which must not round to 0 in float32.
constexpr double kSimamLeastLam = 1e-18;

inline SimamShape simam_shape(const at::Tensor& x, FeatureLayout layout, Dtype dtype) {
  return {x.size(0), x.size(1), x.size(2) * x.size(3), layout, dtype};
}

inline Dtype check_simam(const char* op, const at::Tensor& x, double lam) {
  const Dtype dtype = check_feature_map(op, x);
  check_at_least(op, "lam", lam, kSimamLeastLam);
  return dtype;
}

// launch(const SimamForward&) runs the kernel. If x is empty, the statistics of its planes are set to 0.
template <typename Launch>
std::tuple<at::Tensor, at::Tensor> simam_forward(const at::Tensor& x, double lam, Launch launch) {
  const Dtype dtype = check_simam("simam", x, lam);
  at::Tensor y = at::empty_like(x);
  const std::optional<FeatureLayout> layout = native_layout(y);
  if (!layout) {
    auto [contiguous_y, stats] = simam_forward(x.contiguous(), lam, launch);
    return {y.copy_(contiguous_y), stats};
  }
  at::Tensor stats = at::empty({x.size(0), x.size(1), 2}, x.options().dtype(wide_dtype(x)));
  if (x.numel() == 0) return {y, stats.zero_()};
  const at::Tensor native_x = in_layout(x, *layout);
  launch(
      {native_x.const_data_ptr(), y.mutable_data_ptr(), stats.mutable_data_ptr(), simam_shape(x, *layout, dtype), lam});
  return {y, stats};
}

// launch(const SimamBackward&) runs the kernel.
template <typename Launch>
at::Tensor simam_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& stats, double lam,
                          Launch launch) {
  const char* op = "simam_backward";
  const Dtype dtype = check_simam(op, x, lam);
  check_gradient(op, "grad_y", grad_y, x);
  check_like(op, "stats", stats, {x.size(0), x.size(1), 2}, wide_dtype(x), x);
  at::Tensor grad_x = at::empty_like(x);
  const std::optional<FeatureLayout> layout = native_layout(grad_x);
  if (!layout) return grad_x.copy_(simam_backward(grad_y, x.contiguous(), stats, lam, launch));
  if (x.numel() == 0) return grad_x;
  const at::Tensor native_x = in_layout(x, *layout), native_grad_y = in_layout(grad_y, *layout);
  const at::Tensor rows = stats.contiguous();
  launch({native_grad_y.const_data_ptr(), native_x.const_data_ptr(), rows.const_data_ptr(), grad_x.mutable_data_ptr(),
          simam_shape(x, *layout, dtype), lam});
  return grad_x;
}

}  // namespace hashengine::binding
