// Vectors for wide loads and stores, and conversions between storage types and arithmetic types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hashengine/types.h"

namespace hashengine {

constexpr int kVectorBytes = 16;  // the most that one instruction loads or stores on every supported architecture

// kWidth elements. One instruction loads or stores the vector, or kVectorBytes of it if the vector is longer.
// kWidth * sizeof(T) must be a power of two.
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T) < kVectorBytes ? kWidth * sizeof(T) : kVectorBytes) Vector {
  T at[kWidth];
};

HE_HOST_DEVICE bool is_aligned(const void* pointer, int bytes = kVectorBytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<unsigned>(bytes) == 0;
}

// The vector that begins at element `begin`. `begin` must be a multiple of kWidth, and the array must have the
// alignment of a Vector<T, kWidth>.
template <int kWidth, typename T>
__device__ __forceinline__ const Vector<T, kWidth>& vector_at(const T* array, int64_t begin) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(array + begin);
}

template <int kWidth, typename T>
__device__ __forceinline__ Vector<T, kWidth>& vector_at(T* array, int64_t begin) {
  return *reinterpret_cast<Vector<T, kWidth>*>(array + begin);
}

// The bytes of a vector as 32-bit words, where that is possible. The compiler splits a loaded Vector of two-byte
// elements right behind the load, and thus waits for it. Several loads are in flight only if their results stay words
// until the last load is issued.
template <typename T, int kWidth>
using Words =
    std::conditional_t<kWidth * sizeof(T) == 16, uint4,
                       std::conditional_t<kWidth * sizeof(T) == 8, uint2,
                                          std::conditional_t<kWidth * sizeof(T) == 4, uint32_t, Vector<T, kWidth>>>>;

template <int kWidth, typename T>
__device__ __forceinline__ Words<T, kWidth> words_at(const T* array, int64_t begin) {
  return *reinterpret_cast<const Words<T, kWidth>*>(array + begin);
}

template <typename T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> as_vector(const Words<T, kWidth>& words) {
  Vector<T, kWidth> vector;
  std::memcpy(&vector, &words, sizeof(vector));
  return vector;
}

// The type in which kernels compute with elements of type T and accumulate them.
template <typename T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// Element i of a vector, converted to Arithmetic<T>. One 32-bit register holds two bfloat16: a shift extracts the
// first, and a mask extracts the second.
template <typename T, int kWidth>
__device__ __forceinline__ Arithmetic<T> widen_at(const Vector<T, kWidth>& vector, int i) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && kWidth % 2 == 0) {
    uint32_t pair;
    std::memcpy(&pair, &vector.at[i - i % 2], sizeof(pair));
    pair = i % 2 ? pair & 0xffff0000u : pair << 16;
    float value;
    std::memcpy(&value, &pair, sizeof(value));
    return value;
  } else {
    return widen(vector.at[i]);
  }
}

// Converts to T: rounds to the nearest value, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(Arithmetic<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

}  // namespace hashengine
