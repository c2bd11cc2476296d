// What a SIMD level provides for Hamming search: a layout for a tile of codes, a layout for queries, and two scans of
// one against the other. Blocks, threads and selection are written once, in hamming_blocks.h and hamming_search.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "hamming_select.h"
#include "hashengine/simd_level.h"
#include "hashengine/types.h"

namespace hashengine {

struct HammingTile {
  const uint8_t* rows;   // as prepare_tile laid them out
  const uint8_t* codes;  // as they came
  int64_t count;         // codes in the tile
  int64_t code_bytes;
  const uint32_t* positions;  // of the codes in the selectors' stream; null: from `position` on
  uint32_t position;

  uint32_t position_of(int64_t code) const { return positions ? positions[code] : position + uint32_t(code); }
};

// A block of queries.
struct HammingQueries {
  const uint8_t* prepared;  // as prepare_queries laid them out
  const uint8_t* codes;     // as they came
  int64_t count;
};

struct HammingKernel {
  // Codes of a tile, so that a tile stays in the first-level cache while a block of queries passes over it.
  int64_t (*tile_codes)(int64_t code_bytes);
  // Bytes of a tile of that many codes, and of a query, as laid out for the scan.
  int64_t (*tile_bytes)(int64_t codes, int64_t code_bytes);
  int64_t (*query_bytes)(int64_t code_bytes);

  void (*prepare_tile)(const uint8_t* codes, int64_t count, int64_t code_bytes, uint8_t* tile);
  void (*prepare_queries)(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared);
  // Offers to each query's selector every code of the tile that is below its bound, in order of position.
  void (*scan)(const HammingTile& tile, const HammingQueries& queries, Selector* selectors);
  // The distance of every code of the tile from one query; as many as fit whole vectors may be written.
  void (*measure)(const HammingTile& tile, const HammingQueries& queries, int64_t query, uint32_t* distances);

  int64_t max_code_bytes;  // longer codes overflow the level's counters
  // Queries that a layout is made for, and how few of them still pay for it; 0 where any number does.
  int64_t block_queries;
  int64_t least_queries;
};

extern const HammingKernel kHammingScalar;
#ifdef HE_X86
extern const HammingKernel kHammingPopcnt;
extern const HammingKernel kHammingAvx2;
extern const HammingKernel kHammingAvx512;
extern const HammingKernel kHammingSlicedAvx2;
extern const HammingKernel kHammingSlicedAvx512;
#elif defined(HE_ARM)
extern const HammingKernel kHammingNeon;
extern const HammingKernel kHammingSlicedNeon;
#endif

constexpr int64_t kTileBytes = 16384;        // half of a first-level cache of 32 KB
constexpr int64_t kTileCodesMultiple = 128;  // what `distances` of measure is rounded up to

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

HE_INLINE uint32_t hamming_distance(const HammingTile& tile, int64_t code, const HammingQueries& queries,
                                    int64_t query) {
  const int64_t bytes = tile.code_bytes;
  return hamming_distance(queries.codes + query * bytes, tile.codes + code * bytes, bytes);
}

// Of kernels that read codes and queries as they lie.
inline int64_t no_layout_bytes(int64_t, int64_t) { return 0; }
inline void no_layout(const uint8_t*, int64_t, int64_t, uint8_t*) {}
HE_INLINE void measure_as_they_lie(const HammingTile& tile, const HammingQueries& queries, int64_t query,
                                   uint32_t* distances) {
  for (int64_t i = 0; i < tile.count; ++i) distances[i] = hamming_distance(tile, i, queries, query);
}

}  // namespace hashengine
