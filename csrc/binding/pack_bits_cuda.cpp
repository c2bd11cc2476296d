#include <torch/library.h>

#include "binding/cuda.h"
#include "binding/pack_bits.h"

namespace hashengine::binding {
namespace {

at::Tensor pack_cuda(const at::Tensor& u) {
  const c10::cuda::CUDAGuard device_guard(u.device());
  return pack_bits(u, [](const PackBits& params) {
    launch_pack_bits(params, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

at::Tensor unpack_cuda(const at::Tensor& codes) {
  const c10::cuda::CUDAGuard device_guard(codes.device());
  return unpack_bits(codes, [](const UnpackBits& params) {
    launch_unpack_bits(params, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

TORCH_LIBRARY_IMPL(hashengine, CUDA, library) {
  library.impl("pack_bits", pack_cuda);
  library.impl("unpack_bits", unpack_cuda);
}

}  // namespace
}  // namespace hashengine::binding
