// The checks of triplet_attention_update that every device shares; a device adds the call of its kernel.
#pragma once

#include <vector>

#include "check.h"
#include "hashengine/triplet_attention_update.h"

namespace hashengine::binding {

// `running` itself where the kernel can write to it, else a copy that is written back at the end.
class InPlace {
 public:
  InPlace(const at::Tensor& running, at::ScalarType dtype) : running_(running), in_use_(running.to(dtype)) {}
  void* data() { return in_use_.mutable_data_ptr(); }
  void finish() {
    if (in_use_.is_same(running_)) {
      running_.unsafeGetTensorImpl()->bump_version();
    } else {
      running_.copy_(in_use_);
    }
  }

 private:
  at::Tensor running_, in_use_;
};

// launch(const TripletUpdate&) runs the kernel.
template <typename Launch>
void triplet_attention_update(const at::Tensor& mean, const at::Tensor& var, at::TensorList running_mean,
                              at::TensorList running_var, at::TensorList num_batches_tracked, at::IntArrayRef counts,
                              std::optional<double> momentum, Launch launch) {
  const char* op = "triplet_attention_update";
  const size_t branches = size_t(mean.numel());
  TORCH_CHECK_VALUE(branches >= 1 && branches <= kTripletBranches, op, ": mean must hold 1 to ", kTripletBranches,
                    " values, got ", branches);
  const Dtype dtype = floating_dtype(mean, op, "mean");
  TORCH_CHECK_VALUE(mean.scalar_type() == sum_dtype(mean.scalar_type()) && var.scalar_type() == mean.scalar_type() &&
                        mean.is_contiguous() && var.is_contiguous() && var.device() == mean.device(),
                    op, ": mean and var must be float32 or float64, alike and contiguous, got ", mean.scalar_type(),
                    " and ", var.scalar_type());
  const auto check_length = [&](size_t length, const char* name) {
    TORCH_CHECK_VALUE(length == branches, op, ": ", name, " must have one entry a branch (", branches,
                      ", as mean has), got ", length);
  };
  check_length(size_t(var.numel()), "var");
  check_length(running_mean.size(), "running_mean");
  check_length(running_var.size(), "running_var");
  check_length(num_batches_tracked.size(), "num_batches_tracked");
  check_length(counts.size(), "counts");
  TORCH_CHECK_VALUE(momentum.value_or(0) >= 0, op, ": momentum must not be negative, got ", *momentum);
  TripletUpdate params{mean.const_data_ptr(), var.const_data_ptr(),  {},   {}, {}, {},
                       int(branches),         momentum.value_or(-1), dtype};
  std::vector<InPlace> in_place;
  const auto use = [&](const at::Tensor& tensor, const char* name, size_t i, at::ScalarType type) {
    TORCH_CHECK_VALUE(tensor.numel() == 1 && tensor.device() == mean.device(), op, ": ", name, "[", i,
                      "] must hold one value on ", mean.device(), ", got ", tensor.sizes(), " on ", tensor.device());
    return in_place.emplace_back(tensor, type).data();
  };
  for (size_t i = 0; i < branches; ++i) {
    TORCH_CHECK_VALUE(counts[i] >= 2, op, ": counts must be at least 2 (one value has no variance), got ", counts);
    params.unbiased[i] = double(counts[i]) / double(counts[i] - 1);
    params.running_mean[i] = use(running_mean[i], "running_mean", i, mean.scalar_type());
    params.running_var[i] = use(running_var[i], "running_var", i, mean.scalar_type());
    params.num_batches_tracked[i] =
        static_cast<int64_t*>(use(num_batches_tracked[i], "num_batches_tracked", i, at::kLong));
  }
  launch(params);
  for (InPlace& tensor : in_place) tensor.finish();
}

}  // namespace hashengine::binding
