// What every binding needs: argument checks that name the op and the argument, dtypes, torch's thread pool.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include "hashengine/parallel.h"
#include "hashengine/types.h"

namespace hashengine::binding {

inline Dtype floating_dtype(const at::Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Dtype::kFloat64;
    case at::kFloat: return Dtype::kFloat32;
    case at::kHalf: return Dtype::kFloat16;
    case at::kBFloat16: return Dtype::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", argument, " must be float64, float32, float16 or bfloat16, got ",
                       tensor.scalar_type());
  }
}

inline void check_codes(const at::Tensor& codes, const char* op, const char* argument) {
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte, op, ": ", argument, " must be packed codes of uint8, got ",
                   codes.scalar_type(), "; pack activations with hashengine.ops.pack_bits first");
}

// The dtype of a sum over elements of `dtype`: half precision adds up in float32.
inline at::ScalarType sum_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// `tensor` itself where it fills its memory without holes, else a copy laid out as empty_like would: an elementwise
// kernel then walks memory in order, whatever the strides.
inline at::Tensor dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? tensor : at::empty_like(tensor).copy_(tensor);
}

// `tensor` laid out in memory exactly as `model` is.
inline at::Tensor like_layout_of(const at::Tensor& model, const at::Tensor& tensor) {
  return tensor.strides() == model.strides() ? tensor : at::empty_like(model).copy_(tensor);
}

// Torch's threads, or the first `most` of them; 0 stands for all.
inline ThreadPool torch_thread_pool(int64_t most = 0) {
  return {[](int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
            at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          most > 0 ? int(std::min<int64_t>(most, at::get_num_threads())) : at::get_num_threads()};
}

}  // namespace hashengine::binding
