// Hamming search in plain C++: any code length, any CPU. Codes and queries are read as they lie, eight bytes at a time.

#include <cstring>

#include "hamming_kernel.h"

namespace hashengine {
namespace {

uint64_t load_word(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  std::memcpy(&word, bytes, size_t(count));
  return word;
}

uint32_t distance(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  uint32_t sum = 0;
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) sum += uint32_t(__builtin_popcountll(load_word(a + i, 8) ^ load_word(b + i, 8)));
  if (i < bytes) sum += uint32_t(__builtin_popcountll(load_word(a + i, bytes - i) ^ load_word(b + i, bytes - i)));
  return sum;
}

int64_t tile_codes(int64_t code_bytes) { return std::max<int64_t>(kTileBytes / code_bytes, 1); }
int64_t tile_bytes(int64_t codes, int64_t code_bytes) { return codes * code_bytes; }
int64_t query_bytes(int64_t code_bytes) { return code_bytes; }

void prepare_tile(const uint8_t* codes, int64_t count, int64_t code_bytes, uint8_t* tile) {
  std::memcpy(tile, codes, size_t(count * code_bytes));
}

void prepare_query(const uint8_t* query, int64_t code_bytes, uint8_t* prepared) {
  std::memcpy(prepared, query, size_t(code_bytes));
}

void scan(const HammingTile& tile, const uint8_t* queries, int64_t query_count, Selector* selectors) {
  for (int64_t q = 0; q < query_count; ++q)
    for (int64_t i = 0; i < tile.count; ++i)
      selectors[q].offer(distance(queries + q * tile.code_bytes, tile.rows + i * tile.code_bytes, tile.code_bytes),
                         tile.position + uint32_t(i));
}

}  // namespace

const HammingKernel kHammingScalar = {tile_codes, tile_bytes,    query_bytes, prepare_tile,
                                      prepare_query, scan, INT64_MAX};

}  // namespace hashengine
