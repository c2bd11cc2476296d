#include <torch/library.h>

#include "binding/triplet_attention_update.h"

namespace hashengine::binding {
namespace {

void update_cpu(const at::Tensor& mean, const at::Tensor& var, at::TensorList running_mean, at::TensorList running_var,
                at::TensorList num_batches_tracked, at::IntArrayRef counts, std::optional<double> momentum) {
  triplet_attention_update(mean, var, running_mean, running_var, num_batches_tracked, counts, momentum,
                           triplet_update_cpu);
}

TORCH_LIBRARY_IMPL(hashengine, CPU, library) { library.impl("triplet_attention_update", update_cpu); }

}  // namespace
}  // namespace hashengine::binding
