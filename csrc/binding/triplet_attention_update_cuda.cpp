#include <torch/library.h>

#include "binding/cuda.h"
#include "binding/triplet_attention_update.h"

namespace hashengine::binding {
namespace {

void update_cuda(const at::Tensor& mean, const at::Tensor& var, at::TensorList running_mean, at::TensorList running_var,
                 at::TensorList num_batches_tracked, at::IntArrayRef counts, std::optional<double> momentum) {
  const c10::cuda::CUDAGuard device_guard(mean.device());
  triplet_attention_update(mean, var, running_mean, running_var, num_batches_tracked, counts, momentum,
                           [](const TripletUpdate& params) {
                             launch_triplet_update(params, c10::cuda::getCurrentCUDAStream());
                             C10_CUDA_KERNEL_LAUNCH_CHECK();
                           });
}

TORCH_LIBRARY_IMPL(hashengine, CUDA, library) { library.impl("triplet_attention_update", update_cuda); }

}  // namespace
}  // namespace hashengine::binding
