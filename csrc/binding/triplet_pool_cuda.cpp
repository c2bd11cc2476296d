#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "triplet_pool.h"

namespace hashengine::binding {
namespace {

TripletPools forward_cuda(const at::Tensor& x) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  return triplet_pool_forward(x, [&](const TripletPoolForward& params) {
    // Freed before the kernels have run: the allocator hands it out again in this stream's order only.
    const at::Tensor workspace =
        at::empty({triplet_pool_forward_workspace_bytes(params.shape)}, x.options().dtype(at::kByte));
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
