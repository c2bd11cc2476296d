// The checks and allocations of simam that every device shares; a device adds the call of its kernel.
#pragma once

#include <ATen/ops/empty.h>

#include <tuple>

#include "feature_map.h"
#include "hashengine/simam.h"

namespace hashengine::binding {

inline SimamShape simam_shape(const at::Tensor& x, FeatureLayout layout, Dtype dtype) {
  return {x.size(0), x.size(1), x.size(2) * x.size(3), layout, dtype};
}

inline Dtype simam_check(const at::Tensor& x, double lam, const char* op) {
  const Dtype dtype = check_feature_map(x, op, "x");
  TORCH_CHECK_VALUE(lam > 0, op, ": lam must be above 0 (a constant plane divides by it), got ", lam);
  return dtype;
}

// launch(const SimamForward&) runs the kernel. Planes without positions have statistics of zero.
template <typename Launch>
std::tuple<at::Tensor, at::Tensor> simam_forward(const at::Tensor& x, double lam, Launch launch) {
  const Dtype dtype = simam_check(x, lam, "simam");
  at::Tensor y = at::empty_like(x);
  const std::optional<FeatureLayout> layout = native_layout(y);
  if (!layout) {
    auto [contiguous_y, stats] = simam_forward(x.contiguous(), lam, launch);
    return {y.copy_(contiguous_y), stats};
  }
  at::Tensor stats = at::empty({x.size(0), x.size(1), 2}, x.options().dtype(sum_dtype(x.scalar_type())));
  if (x.numel() == 0) return {y, stats.zero_()};
  const at::Tensor native_x = in_layout(x, *layout);
  launch(
      {native_x.const_data_ptr(), y.mutable_data_ptr(), stats.mutable_data_ptr(), simam_shape(x, *layout, dtype), lam});
  return {y, stats};
}

template <typename Launch>
at::Tensor simam_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& stats, double lam,
                          Launch launch) {
  const char* op = "simam_backward";
  const Dtype dtype = simam_check(x, lam, op);
  check_like(grad_y, op, "grad_y", x.sizes(), x.scalar_type(), x);
  check_like(stats, op, "stats", {x.size(0), x.size(1), 2}, sum_dtype(x.scalar_type()), x);
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
