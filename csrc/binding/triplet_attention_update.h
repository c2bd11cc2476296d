// triplet_attention_update: the checks that all devices share. Each device adds the call of its kernel.
#pragma once

#include <optional>
#include <vector>

#include "binding/check.h"
#include "hashengine/triplet_attention_update.h"

namespace hashengine::binding {

// A buffer of one value that the kernel updates. If the buffer has the kernel's dtype, the kernel updates it in place,
// and write_back() only tells autograd that the buffer has changed. Otherwise the kernel updates a converted copy, and
// write_back() copies the value to the buffer.
class UpdatedBuffer {
 public:
  UpdatedBuffer(const at::Tensor& buffer, at::ScalarType dtype) : buffer_(buffer), native_(buffer.to(dtype)) {}
  void* data() { return native_.mutable_data_ptr(); }
  void write_back() {
    if (native_.is_same(buffer_)) {
      buffer_.unsafeGetTensorImpl()->bump_version();
    } else {
      buffer_.copy_(native_);
    }
  }

 private:
  at::Tensor buffer_, native_;
};

// launch(const TripletUpdate&) runs the kernel.
template <typename Launch>
void triplet_attention_update(const at::Tensor& mean, const at::Tensor& var, at::TensorList running_mean,
                              at::TensorList running_var, at::TensorList num_batches_tracked, at::IntArrayRef counts,
                              std::optional<double> momentum, Launch launch) {
  const char* op = "triplet_attention_update";
  const size_t branches = size_t(mean.numel());
  const std::optional<Dtype> dtype = floating_dtype(mean.scalar_type());
  TORCH_CHECK_VALUE(mean.dim() == 1 && 1 <= branches && branches <= kTripletBranches && dtype &&
                        mean.scalar_type() == wide_dtype(mean),
                    op, ": mean must be float32 or float64 with 1 to 3 values, one per branch, got ", dtype_name(mean),
                    " ", mean.sizes());
  check_like(op, "var", var, mean.sizes(), mean.scalar_type(), mean);
  const auto check_length = [&](size_t length, const char* name) {
    TORCH_CHECK_VALUE(length == branches, op, ": ", name, " must be a list of one entry per branch (", branches,
                      "), got ", length);
  };
  check_length(running_mean.size(), "running_mean");
  check_length(running_var.size(), "running_var");
  check_length(num_batches_tracked.size(), "num_batches_tracked");
  check_length(counts.size(), "counts");
  const auto check_values = [&](at::TensorList tensors, const char* name) {
    for (size_t i = 0; i < branches; ++i)
      TORCH_CHECK_VALUE(tensors[i].numel() == 1 && tensors[i].device() == mean.device(), op, ": ", name, "[", i,
                        "] must be one value on ", mean.device(), ", got ", tensors[i].sizes(), " on ",
                        tensors[i].device());
  };
  check_values(running_mean, "running_mean");
  check_values(running_var, "running_var");
  check_values(num_batches_tracked, "num_batches_tracked");
  for (const int64_t count : counts)
    TORCH_CHECK_VALUE(count >= 2, op, ": counts must be at least 2 (one value has no variance), got ", counts);
  if (momentum) check_at_least(op, "momentum", *momentum, 0);

  const at::Tensor native_mean = mean.contiguous(), native_var = var.contiguous();
  TripletUpdate params{native_mean.const_data_ptr(),
                       native_var.const_data_ptr(),
                       {},
                       {},
                       {},
                       {},
                       int(branches),
                       momentum.value_or(-1),
                       *dtype};
  std::vector<UpdatedBuffer> buffers;
  const auto updated = [&](const at::Tensor& buffer, at::ScalarType type) {
    return buffers.emplace_back(buffer, type).data();
  };
  for (size_t i = 0; i < branches; ++i) {
    params.unbiased[i] = double(counts[i]) / double(counts[i] - 1);
    params.running_mean[i] = updated(running_mean[i], mean.scalar_type());
    params.running_var[i] = updated(running_var[i], mean.scalar_type());
    params.num_batches_tracked[i] = static_cast<int64_t*>(updated(num_batches_tracked[i], at::kLong));
  }
  launch(params);
  for (UpdatedBuffer& buffer : buffers) buffer.write_back();
}

}  // namespace hashengine::binding
