// The maximum of two values; NaN if either is NaN, like torch.maximum.
#pragma once

#include <type_traits>

#include "cuda/common/vec.cuh"

namespace hashengine {

__device__ __forceinline__ float maximum(float a, float b) {
#if defined(__CUDA_ARCH__)
  float larger;
  // A single instruction from sm_80 on. fmaxf would ignore a NaN.
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a > b || a != a ? a : b;
#endif
}

__device__ __forceinline__ double maximum(double a, double b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ __half maximum(__half a, __half b) { return __hmax_nan(a, b); }
__device__ __forceinline__ __nv_bfloat16 maximum(__nv_bfloat16 a, __nv_bfloat16 b) { return __hmax_nan(a, b); }

// The elementwise maximum. Elements of two bytes are processed in pairs, which halves the number of instructions.
template <typename T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> maximum(const Vector<T, kWidth>& a, const Vector<T, kWidth>& b) {
  Vector<T, kWidth> larger;
  if constexpr (sizeof(T) == 2 && kWidth % 2 == 0) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      const Pair pair = __hmax2_nan(Pair{a.at[i], a.at[i + 1]}, Pair{b.at[i], b.at[i + 1]});
      larger.at[i] = pair.x;
      larger.at[i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) larger.at[i] = maximum(a.at[i], b.at[i]);
  }
  return larger;
}

}  // namespace hashengine
