#include <torch/library.h>

#include "binding/triplet_attention.h"

namespace hashengine::binding {
namespace {

TripletOutputs forward_cpu(const at::Tensor& x, at::TensorList conv_weight, at::TensorList bn_weight,
                           at::TensorList bn_bias, at::TensorList running_mean, at::TensorList running_var,
                           bool training, double eps) {
  return triplet_forward(
      x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps,
      [](const TripletForward& params) { triplet_forward_cpu(params, simd_level(), torch_thread_pool()); });
}

at::Tensor inference_cpu(const at::Tensor& x, at::TensorList conv_weight, at::TensorList bn_weight,
                         at::TensorList bn_bias, at::TensorList running_mean, at::TensorList running_var, double eps) {
  return triplet_inference(
      x, conv_weight, bn_weight, bn_bias, running_mean, running_var, eps,
      [](const TripletInference& params) { triplet_inference_cpu(params, simd_level(), torch_thread_pool()); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_cpu(
    const at::Tensor& grad_y, const at::Tensor& x, at::TensorList conv_weight, at::TensorList bn_weight,
    at::TensorList bn_bias, const at::Tensor& mean, const at::Tensor& var, const at::Tensor& pooled,
    const at::Tensor& index, const at::Tensor& response, bool training, double eps) {
  return triplet_backward(
      grad_y, x, conv_weight, bn_weight, bn_bias, mean, var, pooled, index, response, training, eps,
      [](const TripletBackward& params) { triplet_backward_cpu(params, simd_level(), torch_thread_pool()); });
}

TORCH_LIBRARY_IMPL(hashengine, CPU, library) {
  library.impl("triplet_attention", forward_cpu);
  library.impl("triplet_attention_inference", inference_cpu);
  library.impl("triplet_attention_backward", backward_cpu);
}

}  // namespace
}  // namespace hashengine::binding
