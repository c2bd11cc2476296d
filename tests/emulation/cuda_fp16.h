// __half and its conversions, which round to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31;
  const int fraction = value.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction ? NAN : INFINITY;
  } else {
    magnitude = exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24);
  }
  return value.bits >> 15 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};
  // 65520 lies halfway between the largest finite half, 65504, and 65536. From there on, values round to infinity.
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  // The magnitude in units of the last place. nearbyint rounds ties to even. A result of 2048 carries into the
  // exponent, which is correct.
  const int units = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {uint16_t(sign | (((exponent + 14) << 10) + units))};
}

struct alignas(4) __half2 {
  __half x, y;
};

// The larger of a and b; NaN if a or b is NaN.
inline __half __hmax_nan(__half a, __half b) {
  const float x = __half2float(a), y = __half2float(b);
  if (std::isnan(x) || std::isnan(y)) return {0x7fff};
  return x < y ? b : a;
}
inline __half2 __hmax2_nan(__half2 a, __half2 b) { return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)}; }
