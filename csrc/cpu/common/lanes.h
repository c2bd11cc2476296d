// Arithmetic on eight lanes in the compiler's vector types: one source for every SIMD level.
//
// A kernel is an HE_INLINE template that uses these functions. run_at_level calls a small function that has the level's
// target attribute. The kernel is inlined into this function and is therefore compiled for the level's instructions.
// Eight floats take one AVX register, or two SSE or NEON registers; eight doubles take twice as many.
//
// Limits. Every function and lambda through which run_at_level reaches code with vectors must be HE_INLINE: a function
// that is not inlined is compiled for the lowest level. Vectors must be local variables, because their alignment in
// memory differs between levels; an array on the heap must store elements instead (LaneArray).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "hashengine/element.h"
#include "hashengine/simd_level.h"

#define HE_INLINE_LAMBDA __attribute__((always_inline))

namespace hashengine {

constexpr int kLanes = 8;

// Real: a vector of eight elements. Mask: a vector of eight integers of the same width, which is the type of a
// comparison's result (-1 for true, 0 for false).
template <typename T>
struct LaneTypes;
template <>
struct LaneTypes<float> {
  typedef float Real __attribute__((vector_size(32)));
  typedef int32_t Mask __attribute__((vector_size(32)));
};
template <>
struct LaneTypes<double> {
  typedef double Real __attribute__((vector_size(64)));
  typedef int64_t Mask __attribute__((vector_size(64)));
};
template <typename T>
using Lanes = typename LaneTypes<T>::Real;
template <typename T>
using LaneMask = typename LaneTypes<T>::Mask;

// An index as wide as T, so that the mask of one comparison selects both values and indices.
template <typename T>
using LaneIndex = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

typedef uint16_t HalfBits __attribute__((vector_size(16)));
typedef uint32_t FloatBits __attribute__((vector_size(32)));

template <typename T>
HE_INLINE Lanes<T> broadcast(T value) {
  return Lanes<T>{} + value;
}

template <typename Vector>
HE_INLINE Vector lane_numbers() {
  return Vector{0, 1, 2, 3, 4, 5, 6, 7};
}

template <typename To, typename From>
HE_INLINE To bit_cast_lanes(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return (To)from;
}

// An unaligned load.
template <typename Vector, typename T>
HE_INLINE Vector load_vector(const T* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// values > limit, for values below 2^31. The comparison is signed, because AVX2 has no unsigned comparison.
HE_INLINE LaneMask<float> exceeds(FloatBits values, int32_t limit) {
  return bit_cast_lanes<LaneMask<float>>(values) > limit;
}

// The upper 16 bits of each lane if kUpper is 1, the lower 16 bits if it is 0.
template <int kUpper>
HE_INLINE HalfBits halves(FloatBits bits) {
  typedef uint16_t Pairs __attribute__((vector_size(32)));
  constexpr int k = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? kUpper : 1 - kUpper;
  const Pairs pairs = (Pairs)bits;
#if defined(__clang__)
  return __builtin_shufflevector(pairs, pairs, k, 2 + k, 4 + k, 6 + k, 8 + k, 10 + k, 12 + k, 14 + k);
#else
  const Pairs packed = __builtin_shuffle(pairs, Pairs{k, 2 + k, 4 + k, 6 + k, 8 + k, 10 + k, 12 + k, 14 + k});
  HalfBits first;
  std::memcpy(&first, &packed, sizeof(first));
  return first;
#endif
}

// --- loads and stores, which convert half precision to and from float32 ---

HE_INLINE Lanes<float> load(const float* from) { return load_vector<Lanes<float>>(from); }
HE_INLINE Lanes<double> load(const double* from) { return load_vector<Lanes<double>>(from); }
HE_INLINE Lanes<float> load(const BFloat16* from) {
  return bit_cast_lanes<Lanes<float>>(__builtin_convertvector(load_vector<HalfBits>(from), FloatBits) << 16);
}
// Like Float16::operator float, for eight elements.
HE_INLINE Lanes<float> load(const Float16* from) {
  const FloatBits bits = __builtin_convertvector(load_vector<HalfBits>(from), FloatBits);
  const FloatBits sign = (bits & 0x8000u) << 16;
  const FloatBits magnitude = (bits & 0x7fffu) << 13;
  const FloatBits scaled = bit_cast_lanes<FloatBits>(bit_cast_lanes<Lanes<float>>(magnitude) * 0x1p112f);
  const FloatBits special = magnitude | 0x7f800000u;
  return bit_cast_lanes<Lanes<float>>(sign | (exceeds(magnitude, 0x0f7fffff) ? special : scaled));
}

HE_INLINE void store(float* to, Lanes<float> value) { std::memcpy(to, &value, sizeof(value)); }
HE_INLINE void store(double* to, Lanes<double> value) { std::memcpy(to, &value, sizeof(value)); }
HE_INLINE void store(BFloat16* to, Lanes<float> value) {
  const FloatBits x = bit_cast_lanes<FloatBits>(value);
  const FloatBits rounded = x + ((x >> 16) & 1u) + 0x7fffu;
  const HalfBits bits = halves<1>(value == value ? rounded : x | 0x00400000u);
  std::memcpy(to, &bits, sizeof(bits));
}
// Like Float16::from, for eight elements.
HE_INLINE void store(Float16* to, Lanes<float> value) {
  const FloatBits x = bit_cast_lanes<FloatBits>(value);
  const FloatBits sign = (x >> 16) & 0x8000u;
  const FloatBits magnitude = x & 0x7fffffffu;
  const FloatBits half_bits = bit_cast_lanes<FloatBits>(broadcast(0.5f));
  const FloatBits subnormal = bit_cast_lanes<FloatBits>(bit_cast_lanes<Lanes<float>>(magnitude) + 0.5f) - half_bits;
  const FloatBits normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  FloatBits half = exceeds(magnitude, 0x387fffff) ? normal : subnormal;
  half = exceeds(magnitude, 0x477fffff) ? FloatBits{} + 0x7c00u : half;
  half = value == value ? half : FloatBits{} + 0x7e00u;
  const HalfBits bits = halves<0>(sign | half);
  std::memcpy(to, &bits, sizeof(bits));
}

// These functions load and store only the first `count` lanes, which are fewer than kLanes. The other lanes are loaded
// as zero.
template <typename Element>
HE_INLINE auto load_first(const Element* from, int count) {
  Element elements[kLanes] = {};
  std::memcpy(elements, from, size_t(count) * sizeof(Element));
  return load(elements);
}
template <typename Element, typename Vector>
HE_INLINE void store_first(Element* to, Vector value, int count) {
  Element elements[kLanes];
  store(elements, value);
  std::memcpy(to, elements, size_t(count) * sizeof(Element));
}

// An array of vectors on the heap.
template <typename T>
class LaneArray {
 public:
  explicit LaneArray(int64_t vectors) : values_(size_t(vectors * kLanes)) {}
  HE_INLINE Lanes<T> operator[](int64_t vector) const { return load(values_.data() + vector * kLanes); }
  HE_INLINE void set(int64_t vector, Lanes<T> value) { store(values_.data() + vector * kLanes, value); }
  HE_INLINE void add(int64_t vector, Lanes<T> value) { set(vector, (*this)[vector] + value); }
  HE_INLINE void clear() { std::memset(values_.data(), 0, values_.size() * sizeof(T)); }

 private:
  std::vector<T> values_;
};

// --- arithmetic ---

HE_INLINE Lanes<float> abs_lanes(Lanes<float> x) {
  return bit_cast_lanes<Lanes<float>>(bit_cast_lanes<LaneMask<float>>(x) & INT32_MAX);
}
HE_INLINE Lanes<double> abs_lanes(Lanes<double> x) {
  return bit_cast_lanes<Lanes<double>>(bit_cast_lanes<LaneMask<double>>(x) & INT64_MAX);
}

// Selects lanes by number: 0 to 7 are the lanes of a, 8 to 15 those of b.
template <int... kFrom, typename Vector>
HE_INLINE Vector pick_lanes(Vector a, Vector b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kFrom...);
#else
  using Mask = decltype(a < b);
  return __builtin_shuffle(a, b, Mask{kFrom...});
#endif
}

// Swaps lane i with lane i ^ kDistance, for each i.
template <int kDistance, typename Vector>
HE_INLINE Vector exchange_lanes(Vector v) {
  constexpr int d = kDistance;
  return pick_lanes<0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d>(v, v);
}

// The sum of all lanes. Lanes that are 4, then 2, then 1 apart are added, so the order is fixed.
template <typename Vector>
HE_INLINE auto sum_lanes(Vector v) {
  v += exchange_lanes<4>(v);
  v += exchange_lanes<2>(v);
  v += exchange_lanes<1>(v);
  return v[0];
}

// e^x, within 1.2 units of the last place for x from -87 to 88. An x outside this range is replaced by the nearer end
// of the range; a NaN stays NaN.
HE_INLINE Lanes<float> exp_lanes(Lanes<float> x) {
  x = x < -87.0f ? broadcast(-87.0f) : x;
  x = x > 88.0f ? broadcast(88.0f) : x;
  const Lanes<float> round = broadcast(0x1.8p23f);  // adding it leaves the nearest integer in the low bits
  const Lanes<float> shifted = x * 0x1.715476p0f + round;
  const Lanes<float> n = shifted - round;
  const Lanes<float> r = (x - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;  // x - n ln 2, with ln 2 in two parts
  Lanes<float> p = r * 0x1.6db462p-10f + 0x1.123b96p-7f;
  p = p * r + 0x1.55545ep-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const FloatBits power = (bit_cast_lanes<FloatBits>(shifted) + 127u) << 23;
  return p * bit_cast_lanes<Lanes<float>>(power);
}

// 2^x for x <= 0, within 2.2 units of the last place for x from -126 to 0. An x below -126 is replaced by -126; a NaN
// stays NaN. It takes two thirds of the instructions of exp_lanes, because it needs no upper limit and no product with
// ln 2.
HE_INLINE Lanes<float> exp2_nonpositive(Lanes<float> x) {
  x = x < -126.0f ? broadcast(-126.0f) : x;
  const Lanes<float> round = broadcast(0x1.8p23f + 127.0f);  // adding it leaves the biased exponent in the low bits
  const Lanes<float> shifted = x + round;
  const Lanes<float> r = x - (shifted - round);
  Lanes<float> p = r * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  p = p * r + 1.0f;
  return p * bit_cast_lanes<Lanes<float>>(bit_cast_lanes<FloatBits>(shifted) << 23);
}

// float64 is used to check gradients, so its speed does not matter.
HE_INLINE Lanes<double> exp_lanes(Lanes<double> x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}
HE_INLINE Lanes<double> exp2_nonpositive(Lanes<double> x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = std::exp2(x[lane]);
  return x;
}

// 1 / (1 + e^-x). In float32 it is within 2.5 units of the last place for x from -87 to 88.
template <typename Vector>
HE_INLINE Vector sigmoid_lanes(Vector x) {
  return 1 / (1 + exp_lanes(-x));
}

// --- one function per level ---

template <typename Kernel, typename... Arguments>
void run_baseline(const Arguments&... arguments) {
  Kernel::run(arguments...);
}

#ifdef HE_X86
template <typename Kernel, typename... Arguments>
HE_TARGET_AVX2 void run_avx2(const Arguments&... arguments) {
  Kernel::run(arguments...);
}
#endif

// Calls Kernel::run, an HE_INLINE static function, which is compiled for `level`. AVX-512 uses the AVX2 code, because
// eight floats do not fill a wider register. NEON is part of the baseline of ARM.
template <typename Kernel, typename... Arguments>
void run_at_level([[maybe_unused]] SimdLevel level, const Arguments&... arguments) {
#ifdef HE_X86
  if (level != SimdLevel::kScalar) return run_avx2<Kernel>(arguments...);
#endif
  run_baseline<Kernel>(arguments...);
}

}  // namespace hashengine
