// What a SIMD level provides for Hamming search: a layout for a tile of codes, a layout for queries, a scan of a tile
// for the nearest codes, and the distances of a tile. The division into blocks and threads and the selection of the
// nearest codes are the same for all levels: plan.h, selector.h and candidate_lists.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/hamming/selector.h"
#include "hashengine/simd_level.h"
#include "hashengine/types.h"

namespace hashengine {

// A group of codes that stays in a cache while every query of a block is compared with it. The codes are consecutive in
// the database or, with a filter that all queries share, the next codes that pass the filter.
struct HammingTile {
  const uint8_t* prepared;  // the codes in the layout that prepare_tile writes
  const uint8_t* codes;     // the codes in the form in which the database stores them
  int64_t count;            // codes in the tile
  int64_t code_bytes;
  const uint32_t* positions;  // position of each code in the chunk; null if the codes are consecutive
  uint32_t first_position;    // position of the first code; used only if `positions` is null

  uint32_t position_of(int64_t code) const { return positions ? positions[code] : first_position + uint32_t(code); }
};

struct QueryBlock {
  const uint8_t* prepared;  // the queries in the layout that prepare_queries writes
  const uint8_t* codes;     // the queries as the caller passed them
  int64_t count;
};

struct HammingKernel {
  // The number of codes per tile.
  int64_t (*tile_codes)(int64_t code_bytes);
  // The bytes of a prepared tile of `codes` codes, and of one prepared query.
  int64_t (*tile_bytes)(int64_t codes, int64_t code_bytes);
  int64_t (*query_bytes)(int64_t code_bytes);

  void (*prepare_tile)(const uint8_t* codes, int64_t count, int64_t code_bytes, uint8_t* prepared);
  void (*prepare_queries)(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared);
  // Pushes to each query's selector, in order of position, every code of the tile whose distance is below the
  // selector's bound. May also push other codes, which the selector rejects.
  void (*scan)(const HammingTile& tile, const QueryBlock& queries, Selector* selectors);
  // Writes the distance of every code of the tile from one query. `distances` has room for tile.count rounded up to a
  // multiple of kDistancesMultiple. Null for kernels that only scan, and for those that have the next two functions and
  // take no longer codes.
  void (*compute_distances)(const HammingTile& tile, const QueryBlock& queries, int64_t query, uint32_t* distances);
  // Write the distances of every code of the tile from two queries: `query`, which is even, and the next one. Each
  // array has the same room as above. For codes of at most kMaxByteDistanceBytes or kMaxShortDistanceBytes bytes. Null
  // if computing two queries together is not faster at this level.
  void (*compute_byte_distances)(const HammingTile& tile, const QueryBlock& queries, int64_t query, uint8_t* first,
                                 uint8_t* second);
  void (*compute_short_distances)(const HammingTile& tile, const QueryBlock& queries, int64_t query, uint16_t* first,
                                  uint16_t* second);

  int64_t max_code_bytes;  // for longer codes, the kernel's counters would overflow or another kernel is faster
  // For bit-sliced kernels: the number of queries per block, and the smallest number of queries for which building the
  // tables of a block pays. Other kernels take any number of queries; for them, both values are 0.
  int64_t block_queries;
  int64_t min_queries;
};

extern const HammingKernel kHammingScalar;
#ifdef HE_X86
extern const HammingKernel kHammingPopcnt;
extern const HammingKernel kHammingAvx2;
extern const HammingKernel kHammingAvx512;
extern const HammingKernel kHammingBitslicedAvx2;
extern const HammingKernel kHammingBitslicedAvx512;
#elif defined(HE_ARM)
extern const HammingKernel kHammingNeon;
extern const HammingKernel kHammingBitslicedNeon;
#endif

constexpr int64_t kTileBytes = 16384;  // half of a first-level cache of 32 KB
constexpr int64_t kDistancesMultiple = 128;
// The longest codes whose distances, and one more value for a code that a filter excludes, fit in 8 and in 16 bits.
constexpr int64_t kMaxByteDistanceBytes = 31, kMaxShortDistanceBytes = 8191;

// Calls body with a value of the smallest type that holds the distances: uint8_t, uint16_t or uint32_t.
template <typename Body>
void with_distance_type(int64_t code_bytes, Body body) {
  if (code_bytes <= kMaxByteDistanceBytes) return body(uint8_t{});
  if (code_bytes <= kMaxShortDistanceBytes) return body(uint16_t{});
  body(uint32_t{});
}

// Loads `count` bytes, at most 8, as a little-endian word. The missing high bytes are zero.
inline uint64_t load_code_word(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  std::memcpy(&word, bytes, size_t(count));
  return word;
}

HE_INLINE uint32_t hamming_distance(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  uint32_t sum = 0;
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8)
    sum += uint32_t(__builtin_popcountll(load_code_word(a + i, 8) ^ load_code_word(b + i, 8)));
  if (i < bytes)
    sum += uint32_t(__builtin_popcountll(load_code_word(a + i, bytes - i) ^ load_code_word(b + i, bytes - i)));
  return sum;
}

HE_INLINE uint32_t hamming_distance(const HammingTile& tile, int64_t code, const QueryBlock& queries, int64_t query) {
  const int64_t bytes = tile.code_bytes;
  return hamming_distance(queries.codes + query * bytes, tile.codes + code * bytes, bytes);
}

// For kernels that read the codes, the queries or both in their stored form, without a prepared layout.
inline int64_t no_tile_bytes(int64_t, int64_t) { return 0; }
inline int64_t no_query_bytes(int64_t) { return 0; }
inline void prepare_nothing(const uint8_t*, int64_t, int64_t, uint8_t*) {}

}  // namespace hashengine
