#include <torch/library.h>

#include "binding/pack_bits.h"

namespace hashengine::binding {
namespace {

at::Tensor pack_cpu(const at::Tensor& u) {
  return pack_bits(u, [](const PackBits& params) {
    check_no_nan("pack_bits", "u", pack_bits_cpu(params, simd_level(), torch_thread_pool()));
  });
}

at::Tensor unpack_cpu(const at::Tensor& codes) {
  return unpack_bits(codes, [](const UnpackBits& params) { unpack_bits_cpu(params, torch_thread_pool()); });
}

TORCH_LIBRARY_IMPL(hashengine, CPU, library) {
  library.impl("pack_bits", pack_cpu);
  library.impl("unpack_bits", unpack_cpu);
}

}  // namespace
}  // namespace hashengine::binding
