// The maximum and the sum of each of kWidth adjacent lines, over the elements that were added so far, in registers. A
// line is the elements of x that are pooled into one value of a map.
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
