// Hamming search in plain C++, for any code length and any CPU. Codes and queries need no prepared layout.
//
// The bits of 16 bytes are counted together, in vectors that every x86-64 and AArch64 CPU has. Such a vector holds two
// codes of 64 bits, four codes of 32 bits, or a part of a longer code.

#include <algorithm>

#include "cpu/hamming/kernel.h"

namespace hashengine {
namespace {

constexpr int64_t kGroupCodes = 8;    // codes that share one test against the bound
constexpr int64_t kSafeVectors = 31;  // whose counts a byte can sum: 31 * 8 < 256

typedef uint64_t Words __attribute__((vector_size(16)));

int64_t tile_codes(int64_t code_bytes) { return std::max(kTileBytes / code_bytes, kGroupCodes); }

template <typename Vector>
HE_INLINE Vector load(const uint8_t* bytes) {
  Vector words;
  std::memcpy(&words, bytes, sizeof(words));
  return words;
}

// In each byte, the number of its bits that are set. Vector: Words, or uint64_t for a single word.
template <typename Vector>
HE_INLINE Vector count_bits(Vector words) {
  words -= words >> 1 & 0x5555555555555555;
  words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333);
  return (words + (words >> 4)) & 0x0f0f0f0f0f0f0f0f;
}

// The sum of the bytes of each word.
template <typename Vector>
HE_INLINE Vector sum_bytes(Vector words) {
  words = (words & 0x00ff00ff00ff00ff) + (words >> 8 & 0x00ff00ff00ff00ff);
  words += words >> 16;
  return (words + (words >> 32)) & 0xffff;
}

HE_INLINE uint32_t distance(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  Words sums = {};
  int64_t byte = 0;
  while (byte + 16 <= bytes) {
    const int64_t end = std::min(bytes - 15, byte + 16 * kSafeVectors);
    Words counts = {};
    for (; byte < end; byte += 16) counts += count_bits(load<Words>(a + byte) ^ load<Words>(b + byte));
    sums += sum_bytes(counts);
  }
  uint64_t sum = sums[0] + sums[1];
  if (byte + 8 <= bytes) {
    sum += sum_bytes(count_bits(load<uint64_t>(a + byte) ^ load<uint64_t>(b + byte)));
    byte += 8;
  }
  if (byte < bytes) {
    // Less than a word is left. If the code has a whole word, the last eight bytes are loaded, and the shift removes
    // those that are counted already. A shorter code is copied into a word, which takes longer.
    const uint64_t differs =
        bytes < 8 ? load_code_word(a, bytes) ^ load_code_word(b, bytes)
                  : (load<uint64_t>(a + bytes - 8) ^ load<uint64_t>(b + bytes - 8)) >> (64 - 8 * (bytes - byte));
    sum += sum_bytes(count_bits(differs));
  }
  return uint32_t(sum);
}

// Writes the distances of kGroupCodes codes from the query.
HE_INLINE void group_distances(const uint8_t* codes, const uint8_t* query, int64_t bytes, uint32_t* distances) {
  if (bytes == 8) {
    const Words queries = Words{} + load<uint64_t>(query);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kGroupCodes; i += 2) {
      const Words pair = sum_bytes(count_bits(load<Words>(codes + 8 * i) ^ queries));
      distances[i] = uint32_t(pair[0]);
      distances[i + 1] = uint32_t(pair[1]);
    }
  } else if (bytes == 4) {
    const Words queries = Words{} + load<uint32_t>(query) * (uint64_t(1) << 32 | 1);
#pragma GCC unroll 2
    for (int64_t i = 0; i < kGroupCodes; i += 4) {
      Words counts = count_bits(load<Words>(codes + 4 * i) ^ queries);
      counts += counts >> 8;
      counts += counts >> 16;  // the lowest byte of each half of a word has the sum of the half's bytes
      for (int64_t word = 0; word < 2; ++word) {
        distances[i + 2 * word] = uint32_t(counts[word] & 0xff);
        distances[i + 2 * word + 1] = uint32_t(counts[word] >> 32 & 0xff);
      }
    }
  } else {
    for (int64_t i = 0; i < kGroupCodes; ++i) distances[i] = distance(query, codes + i * bytes, bytes);
  }
}

// Calls visit(first, count, distances) for each group of kGroupCodes codes of the tile, and then for each code that
// remains: `distances` are those of `count` codes from the code `first` on.
template <typename Visit>
HE_INLINE void for_each_group(const HammingTile& tile, const uint8_t* query, Visit visit) {
  const int64_t bytes = tile.code_bytes;
  uint32_t distances[kGroupCodes];
  int64_t i = 0;
  for (; i + kGroupCodes <= tile.count; i += kGroupCodes) {
    group_distances(tile.codes + i * bytes, query, bytes, distances);
    visit(i, kGroupCodes, distances);
  }
  for (; i < tile.count; ++i) {
    distances[0] = distance(query, tile.codes + i * bytes, bytes);
    visit(i, 1, distances);
  }
}

void scan(const HammingTile& tile, const QueryBlock& queries, Selector* selectors) {
  for (int64_t q = 0; q < queries.count; ++q) {
    Selector& selector = selectors[q];
    for_each_group(tile, queries.codes + q * tile.code_bytes, [&](int64_t first, int64_t count, const uint32_t* found) {
      const uint32_t bound = selector.bound();
      bool is_below = false;
      for (int64_t i = 0; i < count; ++i) is_below |= found[i] < bound;
      if (__builtin_expect(!is_below, 1)) return;
      for (int64_t i = 0; i < count; ++i) selector.push(found[i], tile.position_of(first + i));
    });
  }
}

void compute_distances(const HammingTile& tile, const QueryBlock& queries, int64_t query, uint32_t* distances) {
  for_each_group(
      tile, queries.codes + query * tile.code_bytes,
      [&](int64_t first, int64_t count, const uint32_t* found) { std::copy(found, found + count, distances + first); });
}

}  // namespace

const HammingKernel kHammingScalar = {tile_codes,
                                      no_tile_bytes,
                                      no_query_bytes,
                                      prepare_nothing,
                                      prepare_nothing,
                                      scan,
                                      compute_distances,
                                      nullptr,
                                      nullptr,
                                      INT64_MAX,
                                      0,
                                      0};

}  // namespace hashengine
