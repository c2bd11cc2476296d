// Hamming search in plain C++: any code length, any CPU. Codes and queries are read as they lie, eight bytes at a time.

#include "hamming_kernel.h"

namespace hashengine {
namespace {

int64_t tile_codes(int64_t code_bytes) { return std::max<int64_t>(kTileBytes / code_bytes, 1); }
int64_t query_bytes(int64_t) { return 0; }

void scan(const HammingTile& tile, const HammingQueries& queries, Selector* selectors) {
  for (int64_t q = 0; q < queries.count; ++q)
    for (int64_t i = 0; i < tile.count; ++i)
      selectors[q].offer(hamming_distance(tile, i, queries, q), tile.position_of(i));
}

void measure(const HammingTile& tile, const HammingQueries& queries, int64_t query, uint32_t* distances) {
  measure_as_they_lie(tile, queries, query, distances);
}

}  // namespace

const HammingKernel kHammingScalar = {tile_codes, no_layout_bytes, query_bytes, no_layout, no_layout,
                                      scan,       measure,         INT64_MAX,   0,         0};

}  // namespace hashengine
