// triplet_pool: the checks and allocations that all devices share. Each device adds the call of its kernel.
#pragma once

#include <ATen/ops/empty.h>

#include <array>
#include <tuple>

#include "binding/feature_map.h"
#include "hashengine/triplet_pool.h"

namespace hashengine::binding {

// The results, in this order: pool_cw, pool_hc, pool_hw, index_cw, index_hc, index_hw.
using TripletPools = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline TripletShape triplet_pool_shape(const char* op, const at::Tensor& x) {
  const Dtype dtype = check_feature_map_not_empty(op, x);
  return {x.size(0), x.size(1), x.size(2), x.size(3), kTripletBranches, 1, FeatureLayout::kContiguous, dtype};
}

// The rows and columns of each branch's map.
inline std::array<std::array<int64_t, 2>, kTripletBranches> triplet_map_sizes(const at::Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  return {{{c, w}, {h, c}, {h, w}}};
}

// launch(const TripletPoolForward&) runs the kernel, which writes the pools in wide_dtype(x).
template <typename Launch>
TripletPools triplet_pool_forward(const at::Tensor& x, Launch launch) {
  TripletPoolForward params{};
  params.shape = triplet_pool_shape("triplet_pool", x);
  const FeatureLayout layout = native_layout(x).value_or(FeatureLayout::kContiguous);
  const at::Tensor native_x = in_layout(x, layout);
  std::array<at::Tensor, kTripletBranches> pools, indices;
  const auto sizes = triplet_map_sizes(x);
  for (size_t b = 0; b < kTripletBranches; ++b) {
    const auto [rows, columns] = sizes[b];
    pools[b] = at::empty({x.size(0), 2, rows, columns}, x.options().dtype(wide_dtype(x)));
    indices[b] = at::empty({x.size(0), rows, columns}, x.options().dtype(at::kInt));
    params.pool[b] = pools[b].mutable_data_ptr();
    params.index[b] = indices[b].mutable_data_ptr<int32_t>();
  }
  params.x = native_x.const_data_ptr();
  params.shape.layout = layout;
  if (x.numel() > 0) launch(params);
  const auto to_dtype_of_x = [&](const at::Tensor& pool) { return pool.to(x.scalar_type()); };
  return {
      to_dtype_of_x(pools[0]), to_dtype_of_x(pools[1]), to_dtype_of_x(pools[2]), indices[0], indices[1], indices[2]};
}

// launch(const TripletPoolBackward&) runs the kernel.
template <typename Launch>
at::Tensor triplet_pool_backward(at::TensorList grads, at::TensorList indices, const at::Tensor& x, Launch launch) {
  const char* op = "triplet_pool_backward";
  TripletPoolBackward params{};
  params.shape = triplet_pool_shape(op, x);
  TORCH_CHECK_VALUE(grads.size() == kTripletBranches && indices.size() == kTripletBranches, op,
                    ": grads and indices must be 3 tensors each, one per branch, got ", grads.size(), " and ",
                    indices.size());
  at::Tensor grad_x = at::empty_like(x);
  const std::optional<FeatureLayout> layout = native_layout(grad_x);
  if (!layout) return grad_x.copy_(triplet_pool_backward(grads, indices, x.contiguous(), launch));
  std::array<at::Tensor, kTripletBranches> native_grads, native_indices;
  const auto sizes = triplet_map_sizes(x);
  for (size_t b = 0; b < kTripletBranches; ++b) {
    const auto [rows, columns] = sizes[b];
    check_like(op, "grads", grads[b], {x.size(0), 2, rows, columns}, x.scalar_type(), x);
    check_like(op, "indices", indices[b], {x.size(0), rows, columns}, at::kInt, x);
    native_grads[b] = grads[b].to(wide_dtype(x)).contiguous();
    native_indices[b] = indices[b].contiguous();
    params.grad_pool[b] = native_grads[b].const_data_ptr();
    params.index[b] = native_indices[b].const_data_ptr<int32_t>();
  }
  params.grad_x = grad_x.mutable_data_ptr();
  params.shape.layout = *layout;
  if (x.numel() > 0) launch(params);
  return grad_x;
}

}  // namespace hashengine::binding
