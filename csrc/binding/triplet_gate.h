// triplet_gate: the checks and allocations that all devices share. Each device adds the call of its kernel.
#pragma once

#include <ATen/ops/empty.h>

#include <array>
#include <optional>
#include <tuple>

#include "binding/feature_map.h"
#include "hashengine/triplet_gate.h"

namespace hashengine::binding {

// The checked maps. given: the maps that the caller passed. native: the same maps, contiguous and of wide_dtype(x). The
// kernel reads `native`, whose memory this struct owns.
struct TripletGateMaps {
  std::array<at::Tensor, kTripletBranches> given, native;
  int branches = 2;

  TripletGateMaps(const char* op, const at::Tensor& x, const at::Tensor& map_cw, const at::Tensor& map_hc,
                  const std::optional<at::Tensor>& map_hw)
      : given{map_cw, map_hc, map_hw.value_or(at::Tensor())}, branches(map_hw ? 3 : 2) {
    constexpr const char* names[] = {"map_cw", "map_hc", "map_hw"};
    const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
    const std::array<int64_t, 4> sizes[] = {{n, 1, c, w}, {n, 1, h, c}, {n, 1, h, w}};
    for (int b = 0; b < branches; ++b) {
      check_floating(op, names[b], given[b]);
      TORCH_CHECK_VALUE(given[b].sizes() == at::IntArrayRef(sizes[b]), op, ": ", names[b], " must be ",
                        at::IntArrayRef(sizes[b]), " for x ", x.sizes(), ", got ", given[b].sizes());
      check_same_device(op, names[b], given[b], x);
      native[b] = given[b].to(wide_dtype(x)).contiguous();
    }
  }

  void copy_pointers_to(const void* (&pointers)[kTripletBranches]) const {
    for (int b = 0; b < branches; ++b) pointers[b] = native[b].const_data_ptr();
  }
};

inline TripletShape triplet_gate_shape(const char* op, const at::Tensor& x, bool has_hw) {
  const Dtype dtype = check_feature_map(op, x);
  return {x.size(0), x.size(1), x.size(2), x.size(3), has_hw ? 3 : 2, 1, FeatureLayout::kContiguous, dtype};
}

// launch(const TripletGateForward&) runs the kernel.
template <typename Launch>
at::Tensor triplet_gate_forward(const at::Tensor& x, const at::Tensor& map_cw, const at::Tensor& map_hc,
                                const std::optional<at::Tensor>& map_hw, Launch launch) {
  const char* op = "triplet_gate";
  TripletGateForward params{};
  params.shape = triplet_gate_shape(op, x, map_hw.has_value());
  const TripletGateMaps maps(op, x, map_cw, map_hc, map_hw);
  at::Tensor y = at::empty_like(x);
  const std::optional<FeatureLayout> layout = native_layout(y);
  if (!layout) return y.copy_(triplet_gate_forward(x.contiguous(), map_cw, map_hc, map_hw, launch));
  const at::Tensor native_x = in_layout(x, *layout);
  maps.copy_pointers_to(params.map);
  params.x = native_x.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.shape.layout = *layout;
  if (x.numel() > 0) launch(params);
  return y;
}

// launch(const TripletGateBackward&) runs the kernel. Without map_hw, the last gradient is an empty tensor.
template <typename Launch>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> triplet_gate_backward(
    const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& map_cw, const at::Tensor& map_hc,
    const std::optional<at::Tensor>& map_hw, Launch launch) {
  const char* op = "triplet_gate_backward";
  TripletGateBackward params{};
  params.shape = triplet_gate_shape(op, x, map_hw.has_value());
  const TripletGateMaps maps(op, x, map_cw, map_hc, map_hw);
  check_gradient(op, "grad_y", grad_y, x);
  at::Tensor grad_x = at::empty_like(x);
  const std::optional<FeatureLayout> layout = native_layout(grad_x);
  if (!layout) {
    auto gradients = triplet_gate_backward(grad_y, x.contiguous(), map_cw, map_hc, map_hw, launch);
    std::get<0>(gradients) = grad_x.copy_(std::get<0>(gradients));
    return gradients;
  }
  const at::Tensor native_x = in_layout(x, *layout), native_grad_y = in_layout(grad_y, *layout);
  std::array<at::Tensor, kTripletBranches> grads;
  grads[2] = at::empty({0}, x.options());
  for (int b = 0; b < maps.branches; ++b) {
    grads[b] = at::empty(maps.given[b].sizes(), maps.native[b].options());
    params.grad_map[b] = grads[b].mutable_data_ptr();
  }
  maps.copy_pointers_to(params.map);
  params.grad_y = native_grad_y.const_data_ptr();
  params.x = native_x.const_data_ptr();
  params.grad_x = grad_x.mutable_data_ptr();
  params.shape.layout = *layout;
  if (x.numel() > 0) {
    launch(params);
  } else {
    for (int b = 0; b < maps.branches; ++b) grads[b].zero_();
  }
  for (int b = 0; b < maps.branches; ++b) grads[b] = grads[b].to(maps.given[b].scalar_type());
  return {grad_x, grads[0], grads[1], grads[2]};
}

}  // namespace hashengine::binding
