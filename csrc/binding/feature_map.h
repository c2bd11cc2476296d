// Feature maps [N, C, H, W] of any strides, as the kernels take them: NCHW or channels_last, without holes.
#pragma once

#include <optional>

#include "check.h"

namespace hashengine::binding {

inline Dtype check_feature_map(const at::Tensor& tensor, const char* op, const char* argument) {
  const Dtype dtype = floating_dtype(tensor, op, argument);
  TORCH_CHECK_VALUE(tensor.dim() == 4, op, ": ", argument, " must be [N, C, H, W], got ", tensor.sizes());
  return dtype;
}

// For what the forward made or what has its result's form.
inline void check_like(const at::Tensor& tensor, const char* op, const char* argument, at::IntArrayRef sizes,
                       at::ScalarType dtype, const at::Tensor& x) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes && tensor.scalar_type() == dtype && tensor.device() == x.device(), op, ": ",
                    argument, " must be ", dtype, " ", sizes, " on ", x.device(), ", got ", tensor.scalar_type(), " ",
                    tensor.sizes(), " on ", tensor.device());
}

// The layout of a tensor that empty_like made, or nothing where it is a third one: an exotic permutation, for which a
// binding calls itself with a contiguous copy and copies the result back.
inline std::optional<FeatureLayout> native_layout(const at::Tensor& dense) {
  if (dense.is_contiguous()) return FeatureLayout::kContiguous;
  if (dense.is_contiguous(at::MemoryFormat::ChannelsLast)) return FeatureLayout::kChannelsLast;
  return std::nullopt;
}

// `tensor` itself where it has the layout, else a copy.
inline at::Tensor in_layout(const at::Tensor& tensor, FeatureLayout layout) {
  const bool contiguous = layout == FeatureLayout::kContiguous;
  return tensor.contiguous(contiguous ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast);
}

}  // namespace hashengine::binding
