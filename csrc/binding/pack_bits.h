// pack_bits and unpack_bits: the checks and allocations that all devices share. Each device adds the call of its
// kernel.
#pragma once

#include <ATen/ops/empty.h>

#include <optional>
#include <vector>

#include "binding/check.h"
#include "hashengine/pack_bits.h"

namespace hashengine::binding {

// launch(const PackBits&) runs the kernel.
template <typename Launch>
at::Tensor pack_bits(const at::Tensor& u, Launch launch) {
  const std::optional<Dtype> dtype =
      u.scalar_type() == at::kBool ? std::optional(Dtype::kBool) : floating_dtype(u.scalar_type());
  TORCH_CHECK_VALUE(dtype.has_value(), "pack_bits: u must be float64, float32, float16, bfloat16 or bool, got ",
                    dtype_name(u));
  TORCH_CHECK_VALUE(u.dim() >= 1 && u.size(-1) % 8 == 0,
                    "pack_bits: u must be [..., bits] with bits a multiple of 8, got ", u.sizes());
  const at::Tensor rows = u.contiguous();
  std::vector<int64_t> sizes = u.sizes().vec();
  sizes.back() /= 8;
  at::Tensor codes = at::empty(sizes, u.options().dtype(at::kByte));
  launch({rows.const_data_ptr(), codes.mutable_data_ptr<uint8_t>(), codes.numel(), *dtype});
  return codes;
}

// launch(const UnpackBits&) runs the kernel.
template <typename Launch>
at::Tensor unpack_bits(const at::Tensor& codes, Launch launch) {
  check_uint8("unpack_bits", "codes", codes);
  TORCH_CHECK_VALUE(codes.dim() >= 1, "unpack_bits: codes must be [..., bits / 8], got a scalar");
  const at::Tensor rows = codes.contiguous();
  std::vector<int64_t> sizes = codes.sizes().vec();
  sizes.back() *= 8;
  at::Tensor bits = at::empty(sizes, codes.options().dtype(at::kBool));
  launch({rows.const_data_ptr<uint8_t>(), bits.mutable_data_ptr<bool>(), codes.numel()});
  return bits;
}

}  // namespace hashengine::binding
