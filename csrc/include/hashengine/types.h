// Types that binding/, cpu/ and cuda/ share: element types, the handle of a CUDA stream, integer helpers.
#pragma once

#include <cstdint>

// The typedef of <cuda_runtime_api.h>. It is repeated here so that a CPU build needs no CUDA header.
typedef struct CUstream_st* cudaStream_t;

#if defined(__CUDACC__)
#define HE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HE_HOST_DEVICE inline
#endif

namespace hashengine {

enum class Dtype { kFloat64, kFloat32, kFloat16, kBFloat16, kBool };

// The memory order of a dense feature map [N, C, H, W].
enum class FeatureLayout { kContiguous /* N, C, H, W */, kChannelsLast /* N, H, W, C */ };

template <typename Integer>
HE_HOST_DEVICE constexpr Integer ceil_div(Integer numerator, Integer denominator) {
  return (numerator + denominator - 1) / denominator;
}

inline constexpr int64_t round_up(int64_t count, int64_t unit) { return ceil_div(count, unit) * unit; }

}  // namespace hashengine
