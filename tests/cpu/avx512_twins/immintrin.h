// Replaces the compiler's <immintrin.h> when tests compile the AVX-512 kernels, so that these run on any x86 CPU. It
// defines the intrinsics that the kernels use, in plain C++. Each function does what the description of its instruction
// says.
#pragma once

#include <cstdint>
#include <cstring>

#define HE_KEEP_IN_REGISTERS(a, b)

struct alignas(64) __m512i {
  uint64_t lane[8];
};
using __mmask8 = uint8_t;

template <typename Operation>
__m512i each_lane(Operation operation) {
  __m512i result;
  for (int i = 0; i < 8; ++i) result.lane[i] = operation(i);
  return result;
}

inline __m512i _mm512_setzero_si512() {
  return each_lane([](int) { return uint64_t(0); });
}
inline __m512i _mm512_set1_epi64(long long value) {
  return each_lane([=](int) { return uint64_t(value); });
}
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) {
  return each_lane([&](int i) { return a.lane[i] ^ b.lane[i]; });
}
inline __m512i _mm512_or_si512(__m512i a, __m512i b) {
  return each_lane([&](int i) { return a.lane[i] | b.lane[i]; });
}
// The bits of a, b and c at the same place form a number from 0 to 7, with the bit of a as the highest. The bit of the
// table with this number is the result.
inline __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
  __m512i result = _mm512_setzero_si512();
  for (int index = 0; index < 8; ++index) {
    if (!(table >> index & 1)) continue;
    const uint64_t x = index & 4 ? 0 : ~0ull, y = index & 2 ? 0 : ~0ull, z = index & 1 ? 0 : ~0ull;
    for (int i = 0; i < 8; ++i) result.lane[i] |= (a.lane[i] ^ x) & (b.lane[i] ^ y) & (c.lane[i] ^ z);
  }
  return result;
}
inline __m512i _mm512_add_epi64(__m512i a, __m512i b) {
  return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline __m512i _mm512_sub_epi64(__m512i a, __m512i b) {
  return each_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline __m512i _mm512_popcnt_epi64(__m512i a) {
  return each_lane([&](int i) { return uint64_t(__builtin_popcountll(a.lane[i])); });
}
inline __mmask8 _mm512_test_epi64_mask(__m512i a, __m512i b) {
  unsigned mask = 0;
  for (int i = 0; i < 8; ++i) mask |= unsigned((a.lane[i] & b.lane[i]) != 0) << i;
  return __mmask8(mask);
}
inline __mmask8 _mm512_movepi64_mask(__m512i a) {
  unsigned mask = 0;
  for (int i = 0; i < 8; ++i) mask |= unsigned(a.lane[i] >> 63) << i;
  return __mmask8(mask);
}
// Like the instructions, these two fault if the address is not a multiple of 64.
inline __m512i _mm512_load_si512(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 64) __builtin_trap();
  __m512i result;
  std::memcpy(&result, address, 64);
  return result;
}
inline void _mm512_store_si512(void* address, __m512i a) {
  if (reinterpret_cast<uintptr_t>(address) % 64) __builtin_trap();
  std::memcpy(address, &a, 64);
}
