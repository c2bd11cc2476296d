// Half-precision elements on the host, without torch or CUDA headers. An element has 16 bits and is converted from and
// to float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "hashengine/types.h"

namespace hashengine {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct BFloat16 {
  uint16_t bits;

  explicit operator float() const { return float_from_bits(uint32_t(bits) << 16); }

  // Rounds to nearest even. NaNs become quiet NaNs.
  static BFloat16 from(float value) {
    const uint32_t x = bits_from_float(value);
    const uint32_t rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
    const uint32_t quiet = (x >> 16) | 0x40u;
    return {uint16_t((x & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
  }
};

struct Float16 {
  uint16_t bits;

  explicit operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
    const uint32_t magnitude = uint32_t(bits & 0x7fffu) << 13;
    // The product with 2^112 is exact. It changes the exponent's bias from 15 to 127 and normalises subnormal numbers.
    const float scaled = float_from_bits(magnitude) * float_from_bits(0x77800000u);
    const bool is_special = magnitude >= 0x0f800000u;  // infinity or NaN
    return float_from_bits(sign | (is_special ? magnitude | 0x7f800000u : bits_from_float(scaled)));
  }

  // Rounds to nearest even, also to subnormal results. NaNs become quiet NaNs.
  static Float16 from(float value) {
    const uint32_t x = bits_from_float(value);
    const uint32_t sign = (x >> 16) & 0x8000u;
    const uint32_t magnitude = x & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00u;
    } else if (magnitude >= 0x47800000u) {  // 65536 or more: infinity
      half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {
      // Below 2^-14 the result is subnormal: a multiple of 2^-24, the smallest positive half. The unit in the last
      // place of 0.5 in float32 is also 2^-24, so adding 0.5 rounds the magnitude to such a multiple.
      half = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
    } else {
      half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return {uint16_t(sign | half)};
  }
};

// Type is the type for arithmetic on elements. load() and store() convert from and to the element.
template <typename Element>
struct Arithmetic {
  using Type = float;
  static float load(Element element) { return float(element); }
  static Element store(float value) { return Element::from(value); }
};

template <>
struct Arithmetic<float> {
  using Type = float;
  static float load(float element) { return element; }
  static float store(float value) { return value; }
};

template <>
struct Arithmetic<double> {
  using Type = double;
  static double load(double element) { return element; }
  static double store(double value) { return value; }
};

// Calls f with a value of the element type that `dtype` names. `dtype` must be a floating-point type.
template <typename F>
auto with_element(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat64: return f(double{});
    case Dtype::kFloat16: return f(Float16{});
    case Dtype::kBFloat16: return f(BFloat16{});
    default: return f(float{});
  }
}

}  // namespace hashengine
