#include <torch/library.h>

#include "binding/cuda.h"
#include "binding/triplet_attention.h"

namespace hashengine::binding {
namespace {

using at::Tensor;
using at::TensorList;

// Checks the kernel size, allocates the workspace and calls launch(workspace, stream).
template <typename Launch>
void run_kernels(const char* op, const Tensor& x, const TripletShape& shape, int64_t workspace_bytes, Launch launch) {
  TORCH_CHECK_VALUE(shape.kernel_size <= kTripletLargestCudaKernel, op, ": conv_weight[0] must be of kernel size ",
                    kTripletLargestCudaKernel, " or less on CUDA, got ", shape.kernel_size);
  const Tensor workspace = cuda_scratch(x, workspace_bytes);
  launch(workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

TripletOutputs forward_cuda(const Tensor& x, TensorList conv_weight, TensorList bn_weight, TensorList bn_bias,
                            TensorList running_mean, TensorList running_var, bool training, double eps) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return triplet_forward(
      x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps, [&](const TripletForward& params) {
        run_kernels("triplet_attention", x, params.shape, triplet_forward_workspace_bytes(params.shape),
                    [&](void* workspace, cudaStream_t stream) { launch_triplet_forward(params, workspace, stream); });
      });
}

Tensor inference_cuda(const Tensor& x, TensorList conv_weight, TensorList bn_weight, TensorList bn_bias,
                      TensorList running_mean, TensorList running_var, double eps) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return triplet_inference(
      x, conv_weight, bn_weight, bn_bias, running_mean, running_var, eps, [&](const TripletInference& params) {
        run_kernels("triplet_attention_inference", x, params.shape, triplet_inference_workspace_bytes(params.shape),
                    [&](void* workspace, cudaStream_t stream) { launch_triplet_inference(params, workspace, stream); });
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_y, const Tensor& x, TensorList conv_weight,
                                                         TensorList bn_weight, TensorList bn_bias, const Tensor& mean,
                                                         const Tensor& var, const Tensor& pooled, const Tensor& index,
                                                         const Tensor& response, bool training, double eps) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return triplet_backward(
      grad_y, x, conv_weight, bn_weight, bn_bias, mean, var, pooled, index, response, training, eps,
      [&](const TripletBackward& params) {
        run_kernels("triplet_attention_backward", x, params.shape, triplet_backward_workspace_bytes(params.shape),
                    [&](void* workspace, cudaStream_t stream) { launch_triplet_backward(params, workspace, stream); });
      });
}

TORCH_LIBRARY_IMPL(hashengine, CUDA, library) {
  library.impl("triplet_attention", forward_cuda);
  library.impl("triplet_attention_inference", inference_cuda);
  library.impl("triplet_attention_backward", backward_cuda);
}

}  // namespace
}  // namespace hashengine::binding
