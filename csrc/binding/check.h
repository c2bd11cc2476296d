// Shared by all bindings: argument checks, dtypes, layouts, and torch's thread pool.
//
// A failed check of an argument throws a ValueError of the form "<op>: <argument> must be <expected>, got <actual>".
// The references in hashengine/ops check arguments in the same words. The message therefore does not depend on the
// kernel that is used. A few conditions are checked on one device only: NaN on the CPU, the largest kernel_size and the
// compute capability on CUDA. A wrong environment variable is reported in the same form, with "hashengine" in the place
// of the op.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>

#include "hashengine/parallel.h"
#include "hashengine/simd_level.h"
#include "hashengine/types.h"

namespace hashengine::binding {

// The name that Python uses: "uint8" for at::kByte.
inline std::string dtype_name(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }
inline std::string dtype_name(const at::Tensor& tensor) { return dtype_name(tensor.scalar_type()); }

// The dtype of sums over elements of `dtype` and of statistics: float64 for float64, otherwise float32.
inline at::ScalarType wide_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }
inline at::ScalarType wide_dtype(const at::Tensor& tensor) { return wide_dtype(tensor.scalar_type()); }

// The Dtype that the kernels use for a floating-point dtype of torch; nullopt for every dtype that is not listed here.
inline std::optional<Dtype> floating_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return Dtype::kFloat64;
    case at::kFloat: return Dtype::kFloat32;
    case at::kHalf: return Dtype::kFloat16;
    case at::kBFloat16: return Dtype::kBFloat16;
    default: return std::nullopt;
  }
}

inline Dtype check_floating(const char* op, const char* argument, const at::Tensor& tensor) {
  const std::optional<Dtype> dtype = floating_dtype(tensor.scalar_type());
  TORCH_CHECK_VALUE(dtype.has_value(), op, ": ", argument, " must be float64, float32, float16 or bfloat16, got ",
                    dtype_name(tensor));
  return *dtype;
}

// Checks that a number is finite and at least `least`.
inline void check_at_least(const char* op, const char* argument, double value, double least) {
  TORCH_CHECK_VALUE(value >= least && std::isfinite(value), op, ": ", argument, " must be a finite number of ", least,
                    " or more, got ", value);
}

// Checks that a number is finite and above 0.
inline void check_positive(const char* op, const char* argument, double value) {
  TORCH_CHECK_VALUE(value > 0 && std::isfinite(value), op, ": ", argument, " must be a finite number above 0, got ",
                    value);
}

inline void check_uint8(const char* op, const char* argument, const at::Tensor& codes) {
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kByte, op, ": ", argument, " must be uint8, got ", dtype_name(codes),
                    "; pack activations with hashengine.ops.pack_bits first");
}

inline void check_same_device(const char* op, const char* argument, const at::Tensor& tensor, const at::Tensor& x) {
  TORCH_CHECK_VALUE(tensor.device() == x.device(), op, ": ", argument, " must be on x's device, ", x.device(), ", got ",
                    tensor.device(), "; move one of them");
}

// Checks that a tensor has the given sizes and dtype and is on the device of `x`. Used for gradients and for results of
// an earlier op.
inline void check_like(const char* op, const char* argument, const at::Tensor& tensor, at::IntArrayRef sizes,
                       at::ScalarType dtype, const at::Tensor& x) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes && tensor.scalar_type() == dtype && tensor.device() == x.device(), op, ": ",
                    argument, " must be ", dtype_name(dtype), " ", sizes, " on ", x.device(), ", got ",
                    dtype_name(tensor), " ", tensor.sizes(), " on ", tensor.device());
}

// Checks the gradient of a result that has the sizes and the dtype of `x`.
inline void check_gradient(const char* op, const char* argument, const at::Tensor& gradient, const at::Tensor& x) {
  check_like(op, argument, gradient, x.sizes(), x.scalar_type(), x);
}

// Only the CPU bindings call this, because the CPU kernels detect NaN while they read the signs. On a GPU, the check
// would have to synchronize.
inline void check_no_nan(const char* op, const char* argument, bool is_free_of_nan) {
  TORCH_CHECK_VALUE(is_free_of_nan, op, ": ", argument,
                    " must be free of NaN, which has no sign, got at least one; check for a diverged model");
}

// Returns `tensor` itself if it fills its memory without holes, otherwise a copy with the strides of empty_like. An
// elementwise kernel can read the result in memory order, whatever the order of its axes.
inline at::Tensor dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? tensor : at::empty_like(tensor).copy_(tensor);
}

// Returns `tensor` itself if it has the strides of `model`, otherwise a copy with those strides.
inline at::Tensor like_layout_of(const at::Tensor& model, const at::Tensor& tensor) {
  return tensor.strides() == model.strides() ? tensor : at::empty_like(model).copy_(tensor);
}

// The SIMD level in use. Throws a ValueError if HASHENGINE_SIMD_LEVEL names a level that is unknown or that this CPU
// lacks.
inline SimdLevel simd_level() {
  try {
    return chosen_simd_level();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

// Torch's thread pool, limited to `max_threads` threads; 0 means no limit.
inline ThreadPool torch_thread_pool(int64_t max_threads = 0) {
  const int threads = at::get_num_threads();
  return {[](int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
            at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          max_threads > 0 ? int(std::min<int64_t>(max_threads, threads)) : threads};
}

}  // namespace hashengine::binding
