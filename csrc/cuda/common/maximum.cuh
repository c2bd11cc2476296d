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
  explicit __device__ __forceinline__ Maxima(const Vector<T, kWidth>& values) {
    std::memcpy(&values_, &values, sizeof(values_));
  }

  __device__ __forceinline__ void add(const Vector<T, kWidth>& others) { add(Maxima(others)); }
  __device__ __forceinline__ void add(const Maxima& others) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) values_.at[i] = larger(values_.at[i], others.values_.at[i]);
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

  static constexpr bool kIsPaired = sizeof(T) == 2 && kWidth % 2 == 0;
  using Folded = Maxima<T, kIsPaired ? 2 : 1>;
  // The maxima of the elements with even indices and of those with odd indices if elements are paired, otherwise the
  // maximum of all elements.
  __device__ __forceinline__ Folded folded() const {
    Storage words = values_;
#pragma unroll
    for (int half = kWords / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) words.at[i] = larger(words.at[i], words.at[i + half]);
    }
    Vector<T, kIsPaired ? 2 : 1> folded;
    std::memcpy(&folded, &words, sizeof(folded));
    return Folded(folded);
  }
  // Copies from and to an array, at an element that has the alignment of a Vector<T, kWidth>.
  static __device__ __forceinline__ Maxima load(const T* array) {
    return Maxima(as_vector<T, kWidth>(words_at<kWidth>(array, 0)));
  }
  __device__ __forceinline__ void store(T* array) const { *reinterpret_cast<Storage*>(array) = values_; }
  // The maximum of all elements.
  __device__ __forceinline__ Arithmetic<T> overall() const {
    const Folded last = folded();
    const Arithmetic<T> first = widen(last.at(0));
    return kIsPaired ? maximum(first, widen(last.at(1))) : first;
  }

 private:
  static constexpr int kWords = kIsPaired ? kWidth / 2 : kWidth;
  using Word = std::conditional_t<kIsPaired, uint32_t, T>;
  using Storage = Vector<Word, kWords>;

  static __device__ __forceinline__ Word larger(Word a, Word b) {
    if constexpr (kIsPaired) {
      using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
      Pair first, second;
      std::memcpy(&first, &a, sizeof(first));
      std::memcpy(&second, &b, sizeof(second));
      first = __hmax2_nan(first, second);
      std::memcpy(&a, &first, sizeof(a));
      return a;
    } else {
      return maximum(a, b);
    }
  }

  Storage values_;
};

}  // namespace hashengine
