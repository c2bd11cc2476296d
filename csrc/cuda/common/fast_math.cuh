// Single instructions of the special function unit, which treat subnormal numbers as zero. exp2f(x) and 1 / x compile
// to more instructions, because both handle subnormal numbers, and 1 / x is rounded correctly.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace hashengine {

// 2^x with an error of at most 2 ulp; results below 2^-126 are zero.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return exp2f(x);
#endif
}

// 1 / x with an error of at most 1 ulp, for x between 2^-126 and 2^126.
__device__ __forceinline__ float fast_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
#else
  return 1 / x;
#endif
}

}  // namespace hashengine
