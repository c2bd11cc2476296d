// kWidth running sums and, if kHasMaximum, maxima, in registers: number i takes element i of each vector that is added.
// A line is the elements that are pooled into one value of a map. The vectors belong to kWidth adjacent lines or, along
// A2, to a single line; then the caller combines the kWidth results.
#pragma once

#include "cuda/common/maximum.cuh"
#include "cuda/common/vec.cuh"

namespace hashengine::triplet {

template <typename Value, int kWidth, bool kHasMaximum>
struct Accumulator {
  using Real = Arithmetic<Value>;
  struct Nothing {};
  std::conditional_t<kHasMaximum, Maxima<Value, kWidth>, Nothing> largest;
  Real sum[kWidth];

  __device__ __forceinline__ Accumulator() {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] = 0;
  }
  explicit __device__ __forceinline__ Accumulator(const Vector<Value, kWidth>& values) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] = widen_at(values, i);
    if constexpr (kHasMaximum) largest = Maxima<Value, kWidth>(values);
  }
  __device__ __forceinline__ void add(const Vector<Value, kWidth>& values) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] += widen_at(values, i);
    if constexpr (kHasMaximum) largest.add(values);
  }
};

}  // namespace hashengine::triplet
