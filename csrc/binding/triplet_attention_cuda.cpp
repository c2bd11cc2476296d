#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "triplet_attention.h"

namespace hashengine::binding {
namespace {

using at::Tensor;
using at::TensorList;

// Calls kernels(workspace, stream). The workspace is freed before the kernels have run: the allocator hands it out
// again in this stream's order only.
template <typename Kernels>
void run(const char* op, const Tensor& x, const TripletShape& shape, int64_t workspace_bytes, Kernels kernels) {
  TORCH_CHECK_VALUE(shape.kernel_size <= kTripletLargestCudaKernel, op,
                    ": conv_weight[0] must have a kernel size of at most ", kTripletLargestCudaKernel, " on CUDA, got ",
                    shape.kernel_size);
  const Tensor workspace = at::empty({workspace_bytes}, x.options().dtype(at::kByte));
  kernels(workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

TripletOutputs forward_cuda(const Tensor& x, TensorList conv_weight, TensorList bn_weight, TensorList bn_bias,
                            TensorList running_mean, TensorList running_var, bool training, double eps) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return triplet_forward(
      x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps, [&](const TripletForward& params) {
        run("triplet_attention", x, params.shape, triplet_forward_workspace_bytes(params.shape),
            [&](void* workspace, cudaStream_t stream) { launch_triplet_forward(params, workspace, stream); });
      });
}

Tensor inference_cuda(const Tensor& x, TensorList conv_weight, TensorList bn_weight, TensorList bn_bias,
                      TensorList running_mean, TensorList running_var, double eps) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return triplet_inference(
      x, conv_weight, bn_weight, bn_bias, running_mean, running_var, eps, [&](const TripletInference& params) {
        run("triplet_attention_inference", x, params.shape, triplet_inference_workspace_bytes(params.shape),
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
        run("triplet_attention_backward", x, params.shape, triplet_backward_workspace_bytes(params.shape),
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
