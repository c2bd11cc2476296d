#include <torch/library.h>

#include "binding/triplet_pool.h"

namespace hashengine::binding {
namespace {

TripletPools forward_cpu(const at::Tensor& x) {
  return triplet_pool_forward(
      x, [](const TripletPoolForward& params) { triplet_pool_forward_cpu(params, simd_level(), torch_thread_pool()); });
}

at::Tensor backward_cpu(at::TensorList grads, at::TensorList indices, const at::Tensor& x) {
  return triplet_pool_backward(grads, indices, x, [](const TripletPoolBackward& params) {
    triplet_pool_backward_cpu(params, simd_level(), torch_thread_pool());
  });
}

TORCH_LIBRARY_IMPL(hashengine, CPU, library) {
  library.impl("triplet_pool", forward_cpu);
  library.impl("triplet_pool_backward", backward_cpu);
}

}  // namespace
}  // namespace hashengine::binding
