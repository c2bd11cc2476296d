#include <torch/library.h>

#include "binding/cuda.h"
#include "binding/triplet_pool.h"

namespace hashengine::binding {
namespace {

TripletPools forward_cuda(const at::Tensor& x) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return triplet_pool_forward(x, [&](const TripletPoolForward& params) {
    const at::Tensor workspace = cuda_scratch(x, triplet_pool_forward_workspace_bytes(params.shape));
    launch_triplet_pool_forward(params, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

at::Tensor backward_cuda(at::TensorList grads, at::TensorList indices, const at::Tensor& x) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return triplet_pool_backward(grads, indices, x, [](const TripletPoolBackward& params) {
    launch_triplet_pool_backward(params, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

TORCH_LIBRARY_IMPL(hashengine, CUDA, library) {
  library.impl("triplet_pool", forward_cuda);
  library.impl("triplet_pool_backward", backward_cuda);
}

}  // namespace
}  // namespace hashengine::binding
