// Hamming search in plain C++: any code length, any CPU. Codes and queries are read as they lie, eight bytes at a time.

#include "hamming_kernel.h"

namespace hashengine {
namespace {

int64_t tile_codes(int64_t code_bytes) { return std::max<int64_t>(kTileBytes / code_bytes, 1); }
int64_t tile_bytes(int64_t, int64_t) { return 0; }
int64_t query_bytes(int64_t) { return 0; }
void prepare_tile(const uint8_t*, int64_t, int64_t, uint8_t*) {}
void prepare_queries(const uint8_t*, int64_t, int64_t, uint8_t*) {}

uint32_t distance(const HammingTile& tile, int64_t code, const HammingQueries& queries, int64_t query) {
  return hamming_distance(queries.codes + query * tile.code_bytes, tile.codes + code * tile.code_bytes, tile.code_bytes);
}

void scan(const HammingTile& tile, const HammingQueries& queries, Selector* selectors) {
  for (int64_t q = 0; q < queries.count; ++q)
    for (int64_t i = 0; i < tile.count; ++i) selectors[q].offer(distance(tile, i, queries, q), tile.position_of(i));
}

void measure(const HammingTile& tile, const HammingQueries& queries, int64_t query, uint32_t* distances) {
  for (int64_t i = 0; i < tile.count; ++i) distances[i] = distance(tile, i, queries, query);
}

}  // namespace

const HammingKernel kHammingScalar = {tile_codes,      tile_bytes, query_bytes, prepare_tile,
                                      prepare_queries, scan,       measure,     INT64_MAX};

}  // namespace hashengine
