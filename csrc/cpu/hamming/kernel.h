// What a SIMD level provides for Hamming search: a layout for a tile of codes, a layout for queries, a scan of a tile
// for the nearest codes, and the distances of a tile. Blocks, threads and selection are written once for all levels, in
// plan.h and candidate_lists.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/hamming/selector.h"
#include "hashengine/simd_level.h"
#include "hashengine/types.h"

namespace hashengine {

// Codes that every query of a block is compared with while they are in a cache: consecutive codes or, with a filter
// that all queries share, the next codes that pass the filter.
struct HammingTile {
  const uint8_t* prepared;  // as laid out by prepare_tile
  const uint8_t* codes;     // as stored in the database
  int64_t count;            // codes in the tile
  int64_t code_bytes;
  const uint32_t* positions;  // of the codes in the chunk; null: consecutive from first_position
  uint32_t first_position;

  uint32_t position_of(int64_t code) const { return positions ? positions[code] : first_position + uint32_t(code); }
};

struct QueryBlock {
  const uint8_t* prepared;  // as laid out by prepare_queries
  const uint8_t* codes;     // as passed by the caller
  int64_t count;
};

struct HammingKernel {
  // The number of codes per tile.
  int64_t (*tile_codes)(int64_t code_bytes);
  // The size of a prepared tile of `codes` codes, and of one prepared query.
  int64_t (*tile_bytes)(int64_t codes, int64_t code_bytes);
  int64_t (*query_bytes)(int64_t code_bytes);

  void (*prepare_tile)(const uint8_t* codes, int64_t count, int64_t code_bytes, uint8_t* prepared);
  void (*prepare_queries)(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared);
  // Pushes to each query's selector, in order of position, every code of the tile whose distance is below the
  // selector's bound. May also push other codes, which the selector rejects.
  void (*scan)(const HammingTile& tile, const QueryBlock& queries, Selector* selectors);
  // Writes the distance of every code of the tile from one query. `distances` has room for tile.count rounded up to a
  // multiple of kDistancesMultiple.
  void (*compute_distances)(const HammingTile& tile, const QueryBlock& queries, int64_t query, uint32_t* distances);

  int64_t max_code_bytes;  // with longer codes the kernel's counters overflow, or another kernel is faster
  // Bit-sliced kernels: the queries per block, and the fewest queries that repay the tables of a block. Other kernels
  // take any number of queries and have 0 for both.
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

// The first `count` <= 8 bytes as a little-endian word, zero-extended.
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

// For kernels that read codes or queries in their stored form and so have no prepared layout.
inline int64_t no_tile_bytes(int64_t, int64_t) { return 0; }
inline int64_t no_query_bytes(int64_t) { return 0; }
inline void prepare_nothing(const uint8_t*, int64_t, int64_t, uint8_t*) {}
HE_INLINE void compute_unprepared_distances(const HammingTile& tile, const QueryBlock& queries, int64_t query,
                                            uint32_t* distances) {
  for (int64_t i = 0; i < tile.count; ++i) distances[i] = hamming_distance(tile, i, queries, query);
}

}  // namespace hashengine
