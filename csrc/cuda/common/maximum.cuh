// The maximum of two values; NaN if either is NaN, like torch.maximum.
#pragma once

#include <cmath>
#include <cstring>
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

// kWidth maxima. Those of two-byte elements are in 32-bit words, two in each: one instruction updates both, and the
// compiler does not unpack them.
template <typename T, int kWidth>
class Maxima {
 public:
  __device__ __forceinline__ Maxima() {
    Vector<T, kWidth> start;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) start.at[i] = narrow<T>(-Arithmetic<T>(INFINITY));
    std::memcpy(&values_, &start, sizeof(values_));
  }

  __device__ __forceinline__ void add(const Vector<T, kWidth>& others) {
    if constexpr (kIsPaired) {
      Storage theirs;
      std::memcpy(&theirs, &others, sizeof(theirs));
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) {
        using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
        Pair a, b;
        std::memcpy(&a, &values_.at[i], sizeof(a));
        std::memcpy(&b, &theirs.at[i], sizeof(b));
        a = __hmax2_nan(a, b);
        std::memcpy(&values_.at[i], &a, sizeof(a));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values_.at[i] = maximum(values_.at[i], others.at[i]);
    }
  }

  __device__ __forceinline__ T at(int i) const {
    if constexpr (kIsPaired) {
      const auto half = static_cast<uint16_t>(values_.at[i / 2] >> (16 * (i % 2)));
      T value;
      std::memcpy(&value, &half, sizeof(value));
      return value;
    } else {
      return values_.at[i];
    }
  }

 private:
  static constexpr bool kIsPaired = sizeof(T) == 2 && kWidth % 2 == 0;
  using Storage = std::conditional_t<kIsPaired, Vector<uint32_t, kIsPaired ? kWidth / 2 : 1>, Vector<T, kWidth>>;
  Storage values_;
};

}  // namespace hashengine
