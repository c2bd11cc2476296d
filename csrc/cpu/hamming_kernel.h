// What a SIMD level provides for Hamming search: a layout for a tile of codes, a layout for a query, and the scan of one
// against the other. The search itself (blocking, threads, selection) is written once, in hamming_topk.cpp.
#pragma once

#include <cstdint>

#include "hamming_select.h"
#include "hashengine/simd_level.h"

namespace hashengine {

struct HammingTile {
  const uint8_t* rows;  // as prepare_tile laid them out
  int64_t count;        // codes in the tile
  int64_t code_bytes;
  uint32_t position;  // of the first code, in the selectors' stream
};

struct HammingKernel {
  // Codes of a tile, so that a tile stays in the first-level cache while a block of queries passes over it.
  int64_t (*tile_codes)(int64_t code_bytes);
  // Bytes of a tile of that many codes, and of a query, as laid out for the scan.
  int64_t (*tile_bytes)(int64_t codes, int64_t code_bytes);
  int64_t (*query_bytes)(int64_t code_bytes);

  void (*prepare_tile)(const uint8_t* codes, int64_t count, int64_t code_bytes, uint8_t* tile);
  void (*prepare_query)(const uint8_t* query, int64_t code_bytes, uint8_t* prepared);
  // Offers to each query's selector every code of the tile that is below its bound, in order of position.
  void (*scan)(const HammingTile& tile, const uint8_t* prepared_queries, int64_t query_count, Selector* selectors);

  int64_t max_code_bytes;  // longer codes overflow the level's counters
};

extern const HammingKernel kHammingScalar;
#ifdef HE_X86
extern const HammingKernel kHammingAvx2;
extern const HammingKernel kHammingAvx512;
#endif

constexpr int64_t kTileBytes = 16384;  // half of a first-level cache of 32 KB

}  // namespace hashengine
