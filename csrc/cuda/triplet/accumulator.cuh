// kWidth running sums and, if kHasMaximum, maxima, in registers: number i takes element i of each vector that is added.
// A line is the elements that are pooled into one value of a map. The vectors belong to kWidth adjacent lines or, along
// A2, to a single line; then the caller combines the kWidth results.
#pragma once

#include <cmath>

#include "cuda/common/maximum.cuh"
#include "cuda/common/vec.cuh"

namespace hashengine::triplet {

template <typename Value, int kWidth, bool kHasMaximum>
struct Accumulator {
  using Real = Arithmetic<Value>;
  Vector<Value, kWidth> largest;  // unused unless kHasMaximum
  Real sum[kWidth];

  __device__ __forceinline__ Accumulator() {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum[i] = 0;
      if constexpr (kHasMaximum) largest.at[i] = narrow<Value>(-Real(INFINITY));
    }
  }
  __device__ __forceinline__ void add(const Vector<Value, kWidth>& values) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] += widen(values.at[i]);
    if constexpr (kHasMaximum) largest = maximum(largest, values);
  }
};

}  // namespace hashengine::triplet
