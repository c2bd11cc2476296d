// Hamming search in plain C++, for any code length and any CPU. Codes and queries need no prepared layout; they are
// read eight bytes at a time.

#include "cpu/hamming/kernel.h"

namespace hashengine {
namespace {

int64_t tile_codes(int64_t code_bytes) { return std::max<int64_t>(kTileBytes / code_bytes, 1); }

void scan(const HammingTile& tile, const QueryBlock& queries, Selector* selectors) {
  for (int64_t q = 0; q < queries.count; ++q)
    for (int64_t i = 0; i < tile.count; ++i)
      selectors[q].push(hamming_distance(tile, i, queries, q), tile.position_of(i));
}

void compute_distances(const HammingTile& tile, const QueryBlock& queries, int64_t query, uint32_t* distances) {
  compute_unprepared_distances(tile, queries, query, distances);
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
