// The checks and allocations of pack_bits and unpack_bits that every device shares; a device adds the kernel's call.
#pragma once

#include <ATen/ops/empty.h>

#include "check.h"
#include "hashengine/pack_bits.h"

namespace hashengine::binding {

template <typename Launch>
at::Tensor pack_bits(const at::Tensor& u, Launch launch) {
  const Dtype dtype = u.scalar_type() == at::kBool ? Dtype::kBool : floating_dtype(u, "pack_bits", "u");
  TORCH_CHECK_VALUE(u.dim() >= 1 && u.size(-1) % 8 == 0,
                    "pack_bits: u must be [..., bits] with bits a multiple of 8, got ", u.sizes());
  const at::Tensor rows = u.contiguous();
  std::vector<int64_t> sizes = u.sizes().vec();
  sizes.back() /= 8;
  at::Tensor codes = at::empty(sizes, u.options().dtype(at::kByte));
  launch({rows.const_data_ptr(), codes.mutable_data_ptr<uint8_t>(), codes.numel(), dtype});
  return codes;
}

template <typename Launch>
at::Tensor unpack_bits(const at::Tensor& codes, Launch launch) {
  check_codes(codes, "unpack_bits", "codes");
  TORCH_CHECK_VALUE(codes.dim() >= 1, "unpack_bits: codes must be [..., bits / 8], got a scalar");
  const at::Tensor rows = codes.contiguous();
  std::vector<int64_t> sizes = codes.sizes().vec();
  sizes.back() *= 8;
  at::Tensor bits = at::empty(sizes, codes.options().dtype(at::kBool));
  launch({rows.const_data_ptr<uint8_t>(), bits.mutable_data_ptr<bool>(), codes.numel()});
  return bits;
}

}  // namespace hashengine::binding
