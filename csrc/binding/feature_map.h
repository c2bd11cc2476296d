// Conversion of feature maps [N, C, H, W] of any strides to the layouts that the kernels take: NCHW or channels_last,
// without holes.
#pragma once

#include <optional>

#include "binding/check.h"

namespace hashengine::binding {

inline Dtype check_feature_map(const char* op, const at::Tensor& x) {
  const Dtype dtype = check_floating(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": x must be [N, C, H, W], got ", x.sizes());
  return dtype;
}

// Like check_feature_map, but also checks that C, H and W are at least 1.
inline Dtype check_feature_map_not_empty(const char* op, const at::Tensor& x) {
  const Dtype dtype = check_feature_map(op, x);
  TORCH_CHECK_VALUE(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, op,
                    ": x must be [N, C, H, W] with C, H and W at least 1, got ", x.sizes());
  return dtype;
}

// The layout of `dense`; nullopt if it is neither contiguous nor channels_last. A function whose y or grad_x has
// neither layout calls itself with a contiguous x, and copies the result to y or grad_x.
inline std::optional<FeatureLayout> native_layout(const at::Tensor& dense) {
  if (dense.is_contiguous()) return FeatureLayout::kContiguous;
  if (dense.is_contiguous(at::MemoryFormat::ChannelsLast)) return FeatureLayout::kChannelsLast;
  return std::nullopt;
}

// `tensor` itself if it has the layout, otherwise a copy.
inline at::Tensor in_layout(const at::Tensor& tensor, FeatureLayout layout) {
  const bool contiguous = layout == FeatureLayout::kContiguous;
  return tensor.contiguous(contiguous ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast);
}

}  // namespace hashengine::binding
