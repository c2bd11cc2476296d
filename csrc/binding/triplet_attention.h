// triplet_attention and triplet_attention_inference: the checks and allocations that all devices share. Each device
// adds the call of its kernel.
#pragma once

#include <ATen/core/TensorBody.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "binding/feature_map.h"
#include "hashengine/triplet_attention.h"

namespace hashengine::binding {

// y, mean, var, pooled, index, response (TripletSaved).
using TripletOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The parameters of the op: up to five lists, such as bn_weight, of one tensor per branch. The constructor checks the
// tensors, and makes them contiguous and of wide_dtype(x) for the kernel. The object owns the memory that the kernel
// reads.
class TripletParameters {
 public:
  using List = std::pair<const char*, at::TensorList>;  // its name and its tensors

  TripletParameters(const char* op, const at::Tensor& x, size_t branches, std::initializer_list<List> lists) {
    const at::ScalarType wide = wide_dtype(x);
    size_t converted = 0;
    at::ScalarType dtype = wide;
    for (const auto& [name, tensors] : lists) {
      TORCH_CHECK_VALUE(tensors.size() == branches, op, ": ", name, " must be ", branches,
                        " tensors, as many as conv_weight, got ", tensors.size());
      for (size_t i = 0; i < branches; ++i) {
        const at::Tensor& tensor = tensors[i];
        TORCH_CHECK_VALUE(floating_dtype(tensor.scalar_type()), op, ": ", name, "[", i,
                          "] must be float64, float32, float16 or bfloat16, got ", dtype_name(tensor));
        TORCH_CHECK_VALUE(tensor.device() == x.device(), op, ": ", name, "[", i, "] must be on x's device, ",
                          x.device(), ", got ", tensor.device(), "; move one of them");
        if (tensor.scalar_type() == wide) continue;
        dtype = converted == 0 || tensor.scalar_type() == dtype ? tensor.scalar_type() : wide;
        ++converted;
      }
    }
    // The parameters of a network in half precision are converted together: on a GPU, that is two kernels, not fifteen.
    const bool together = converted > 1 && dtype != wide;
    std::vector<at::Tensor> flat;
    size_t list = 0;
    for (const auto& [name, tensors] : lists) {
      for (size_t i = 0; i < branches; ++i) {
        if (together && tensors[i].scalar_type() == dtype) {
          flat.push_back(tensors[i].reshape(-1));
        } else {
          owned_.push_back(tensors[i].to(wide).contiguous());
          pointers_[list][i] = owned_.back().const_data_ptr();
        }
      }
      ++list;
    }
    if (!together) return;
    owned_.push_back(at::cat(flat).to(wide));
    const auto* next = static_cast<const uint8_t*>(owned_.back().const_data_ptr());
    list = 0;
    for (const auto& [name, tensors] : lists) {
      for (size_t i = 0; i < branches; ++i) {
        if (tensors[i].scalar_type() != dtype) continue;
        pointers_[list][i] = next;
        next += tensors[i].numel() * int64_t(c10::elementSize(wide));
      }
      ++list;
    }
  }

  // The pointers to the tensors of the list with this number.
  void copy_pointers_to(size_t list, const void* (&pointers)[kTripletBranches]) const {
    std::copy(pointers_[list].begin(), pointers_[list].end(), pointers);
  }

 private:
  c10::SmallVector<at::Tensor, 5 * kTripletBranches> owned_;
  std::array<std::array<const void*, kTripletBranches>, 5> pointers_{};
};

// Checks `x`, the number of branches, the sizes of the convolution's weights, and eps as BatchNorm does. In training,
// also checks that the batch has enough values for statistics.
inline TripletShape check_triplet_shape(const char* op, const at::Tensor& x, at::TensorList conv_weight, bool training,
                                        double eps) {
  const Dtype dtype = check_feature_map_not_empty(op, x);
  TORCH_CHECK_VALUE(conv_weight.size() == 2 || conv_weight.size() == 3, op,
                    ": conv_weight must be 2 or 3 tensors, one per branch, got ", conv_weight.size());
  for (size_t i = 0; i < conv_weight.size(); ++i) {
    const at::Tensor& weight = conv_weight[i];
    TORCH_CHECK_VALUE(
        weight.dim() == 4 && weight.size(0) == 1 && weight.size(1) == 2 && weight.size(2) == weight.size(3), op,
        ": conv_weight[", i, "] must be [1, 2, K, K], got ", weight.sizes());
    TORCH_CHECK_VALUE(weight.size(2) % 2 == 1, op, ": conv_weight[", i, "] must be of odd kernel size, got ",
                      weight.size(2));
    TORCH_CHECK_VALUE(weight.size(2) == conv_weight[0].size(2), op, ": conv_weight[", i,
                      "] must be of the kernel size of conv_weight[0], ", conv_weight[0].size(2), ", got ",
                      weight.size(2));
  }
  const TripletShape shape{x.size(0),
                           x.size(1),
                           x.size(2),
                           x.size(3),
                           int(conv_weight.size()),
                           int(conv_weight[0].size(2)),
                           FeatureLayout::kContiguous,
                           dtype};
  constexpr const char* names[] = {"cw", "hc", "hw"};
  for (int branch = 0; branch < shape.branches && training; ++branch)
    TORCH_CHECK_VALUE(shape.map_numel(branch) > 1, op,
                      ": x must be [N, C, H, W] with more than one value per branch in training, got ", x.sizes(),
                      " with ", shape.map_numel(branch), " in branch ", names[branch],
                      "; use eval mode or a larger batch");
  if (training) {
    check_positive(op, "eps", eps);
  } else {
    check_at_least(op, "eps", eps, 0);
  }
  return shape;
}

// The checked parameters of a forward. The object owns the memory that the kernel reads.
class TripletForwardParameters {
 public:
  TripletForwardParameters(const char* op, const at::Tensor& x, at::TensorList conv_weight, at::TensorList bn_weight,
                           at::TensorList bn_bias, at::TensorList running_mean, at::TensorList running_var)
      : parameters_(op, x, conv_weight.size(),
                    {{"conv_weight", conv_weight},
                     {"bn_weight", bn_weight},
                     {"bn_bias", bn_bias},
                     {"running_mean", running_mean},
                     {"running_var", running_var}}) {
    const std::pair<const char*, at::TensorList> scalars[] = {
        {"bn_weight", bn_weight}, {"bn_bias", bn_bias}, {"running_mean", running_mean}, {"running_var", running_var}};
    for (const auto& [name, tensors] : scalars)
      for (size_t i = 0; i < tensors.size(); ++i)
        TORCH_CHECK_VALUE(tensors[i].sizes() == at::IntArrayRef{1}, op, ": ", name, "[", i, "] must be [1], got ",
                          tensors[i].sizes());
  }

  // Params: TripletForward or TripletInference.
  template <typename Params>
  void copy_pointers_to(Params& params, double eps) const {
    parameters_.copy_pointers_to(0, params.parameters.conv_weight);
    parameters_.copy_pointers_to(1, params.parameters.bn_weight);
    parameters_.copy_pointers_to(2, params.parameters.bn_bias);
    parameters_.copy_pointers_to(3, params.running_mean);
    parameters_.copy_pointers_to(4, params.running_var);
    params.parameters.eps = eps;
  }

 private:
  TripletParameters parameters_;
};

// launch(const TripletForward&) runs the kernel.
template <typename Launch>
TripletOutputs triplet_forward(const at::Tensor& x, at::TensorList conv_weight, at::TensorList bn_weight,
                               at::TensorList bn_bias, at::TensorList running_mean, at::TensorList running_var,
                               bool training, double eps, Launch launch) {
  const char* op = "triplet_attention";
  TripletForward params{};
  params.shape = check_triplet_shape(op, x, conv_weight, training, eps);
  const TripletForwardParameters parameters(op, x, conv_weight, bn_weight, bn_bias, running_mean, running_var);
  at::Tensor y = at::empty_like(x);
  const std::optional<FeatureLayout> layout = native_layout(y);
  if (!layout) {
    auto outputs = triplet_forward(x.contiguous(), conv_weight, bn_weight, bn_bias, running_mean, running_var, training,
                                   eps, launch);
    std::get<0>(outputs) = y.copy_(std::get<0>(outputs));
    return outputs;
  }
  const auto wide = x.options().dtype(wide_dtype(x));
  const int64_t numel = params.shape.maps_numel();
  at::Tensor mean = at::empty({params.shape.branches}, wide), var = at::empty({params.shape.branches}, wide);
  at::Tensor pooled = at::empty({2 * numel}, wide), response = at::empty({numel}, wide);
  at::Tensor index = at::empty({numel}, x.options().dtype(at::kInt));
  const at::Tensor native_x = in_layout(x, *layout);
  parameters.copy_pointers_to(params, eps);
  params.x = native_x.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.saved = {pooled.mutable_data_ptr(), index.mutable_data_ptr<int32_t>(), response.mutable_data_ptr(),
                  mean.mutable_data_ptr(), var.mutable_data_ptr()};
  params.training = training;
  params.shape.layout = *layout;
  launch(params);
  return {y, mean, var, pooled, index, response};
}

// launch(const TripletInference&) runs the kernel.
template <typename Launch>
at::Tensor triplet_inference(const at::Tensor& x, at::TensorList conv_weight, at::TensorList bn_weight,
                             at::TensorList bn_bias, at::TensorList running_mean, at::TensorList running_var,
                             double eps, Launch launch) {
  const char* op = "triplet_attention_inference";
  TripletInference params{};
  params.shape = check_triplet_shape(op, x, conv_weight, false, eps);
  const TripletForwardParameters parameters(op, x, conv_weight, bn_weight, bn_bias, running_mean, running_var);
  at::Tensor y = at::empty_like(x);
  const std::optional<FeatureLayout> layout = native_layout(y);
  if (!layout)
    return y.copy_(
        triplet_inference(x.contiguous(), conv_weight, bn_weight, bn_bias, running_mean, running_var, eps, launch));
  if (x.numel() == 0) return y;
  const at::Tensor native_x = in_layout(x, *layout);
  parameters.copy_pointers_to(params, eps);
  params.x = native_x.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.shape.layout = *layout;
  launch(params);
  return y;
}

// launch(const TripletBackward&) runs the kernel.
template <typename Launch>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> triplet_backward(
    const at::Tensor& grad_y, const at::Tensor& x, at::TensorList conv_weight, at::TensorList bn_weight,
    at::TensorList bn_bias, const at::Tensor& mean, const at::Tensor& var, const at::Tensor& pooled,
    const at::Tensor& index, const at::Tensor& response, bool training, double eps, Launch launch) {
  const char* op = "triplet_attention_backward";
  TripletBackward params{};
  params.shape = check_triplet_shape(op, x, conv_weight, training, eps);
  const int64_t branches = params.shape.branches, numel = params.shape.maps_numel();
  const TripletParameters parameters(op, x, size_t(branches),
                                     {{"conv_weight", conv_weight}, {"bn_weight", bn_weight}, {"bn_bias", bn_bias}});
  const at::ScalarType saved_dtype = wide_dtype(x);
  check_gradient(op, "grad_y", grad_y, x);
  check_like(op, "mean", mean, {branches}, saved_dtype, x);
  check_like(op, "var", var, {branches}, saved_dtype, x);
  check_like(op, "pooled", pooled, {2 * numel}, saved_dtype, x);
  check_like(op, "index", index, {numel}, at::kInt, x);
  check_like(op, "response", response, {numel}, saved_dtype, x);
  at::Tensor grad_x = at::empty_like(x);
  const std::optional<FeatureLayout> layout = native_layout(grad_x);
  if (!layout) {
    auto gradients = triplet_backward(grad_y, x.contiguous(), conv_weight, bn_weight, bn_bias, mean, var, pooled, index,
                                      response, training, eps, launch);
    std::get<0>(gradients) = grad_x.copy_(std::get<0>(gradients));
    return gradients;
  }
  const auto wide = x.options().dtype(saved_dtype);
  const int64_t kernel_size = params.shape.kernel_size;
  at::Tensor grad_conv_weight = at::empty({branches, 2, kernel_size, kernel_size}, wide);
  at::Tensor grad_bn_weight = at::empty({branches}, wide), grad_bn_bias = at::empty({branches}, wide);
  const at::Tensor native_x = in_layout(x, *layout), native_grad_y = in_layout(grad_y, *layout);
  const std::array<at::Tensor, 5> saved{pooled.contiguous(), index.contiguous(), response.contiguous(),
                                        mean.contiguous(), var.contiguous()};
  parameters.copy_pointers_to(0, params.parameters.conv_weight);
  parameters.copy_pointers_to(1, params.parameters.bn_weight);
  parameters.copy_pointers_to(2, params.parameters.bn_bias);
  params.parameters.eps = eps;
  params.grad_y = native_grad_y.const_data_ptr();
  params.x = native_x.const_data_ptr();
  // The pointers in TripletSaved are to non-const memory: the forward writes through them. The backward only reads.
  const auto read_only = [](const at::Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); };
  params.saved = {read_only(saved[0]), static_cast<int32_t*>(read_only(saved[1])), read_only(saved[2]),
                  read_only(saved[3]), read_only(saved[4])};
  params.grad_x = grad_x.mutable_data_ptr();
  params.grad_conv_weight = grad_conv_weight.mutable_data_ptr();
  params.grad_bn_weight = grad_bn_weight.mutable_data_ptr();
  params.grad_bn_bias = grad_bn_bias.mutable_data_ptr();
  params.training = training;
  params.shape.layout = *layout;
  launch(params);
  return {grad_x, grad_conv_weight, grad_bn_weight, grad_bn_bias};
}

}  // namespace hashengine::binding
