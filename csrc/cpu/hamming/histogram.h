// Histograms of the distances of a tile.
//
// Two increments of the same counter in a row are slow, because the second must wait for the store of the first.
// Neighbouring codes often have the same distance. There are two ways out:
//
// - Banks: each value has kCounterBanks counters, which consecutive codes use in turn.
// - Pairs: each pair of values has a counter, and two codes take one increment. That halves the increments, and equal
//   pairs are rarer than equal values. It needs width^2 counters, so it suits small values and many codes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "hashengine/simd_level.h"

namespace hashengine {

constexpr int64_t kCounterBanks = 4;
constexpr int64_t kMaxPairWidth = 256;  // so that values are bytes and the number of a pair has 16 bits

// counters: [value, bank].
template <typename Value>
void count_in_banks(const Value* values, int64_t count, uint32_t* counters) {
  int64_t i = 0;
  for (; i + kCounterBanks <= count; i += kCounterBanks)
#pragma GCC unroll 4
    for (int64_t bank = 0; bank < kCounterBanks; ++bank) ++counters[values[i + bank] * kCounterBanks + bank];
  for (; i < count; ++i) ++counters[values[i] * kCounterBanks];
}

// counters: [second value, first value]. count: a multiple of 8. pairs: scratch memory for count / 2 values.
inline void count_pairs(const uint8_t* values, int64_t count, uint16_t width, uint16_t* pairs, uint32_t* counters) {
  for (int64_t i = 0; i < count / 2; ++i) {
    uint16_t both;
    std::memcpy(&both, values + 2 * i, sizeof(both));
    pairs[i] = uint16_t((both & 255) + width * (both >> 8));
  }
  for (int64_t i = 0; i < count / 2; i += 4) {
    uint64_t four;  // one load instead of four
    std::memcpy(&four, pairs + i, sizeof(four));
    ++counters[four & 0xffff];
    ++counters[four >> 16 & 0xffff];
    ++counters[four >> 32 & 0xffff];
    ++counters[four >> 48];
  }
}

}  // namespace hashengine
