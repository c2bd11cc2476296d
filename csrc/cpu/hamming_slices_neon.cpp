#include "hamming_kernel.h"

#ifdef HE_ARM

#define HE_SLICES_TARGET  // NEON is part of every aarch64
#include "hamming_slices.h"

namespace hashengine {
namespace {

struct Slices {
  typedef uint64_t Vector __attribute__((vector_size(16)));

  // The carry is c where a and b differ, else one of these two: a bitwise select.
  static HE_SLICES Vector full_add(Vector& sum, Vector b, Vector c) {
    const Vector either = sum ^ b, carry = (either & c) | (~either & sum);
    sum = either ^ c;
    return carry;
  }
  static HE_SLICES bool has_zero(Vector v) { return (v[0] & v[1]) != ~uint64_t(0); }
};
using Scan = SlicedScan<Slices>;

constexpr int64_t kLeastQueries = 64;  // estimated: fewer are faster with the population count

void prepare_queries(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared) {
  Scan::prepare_queries(queries, count, code_bytes, prepared);
}

void scan(const HammingTile& tile, const HammingQueries& queries, Selector* selectors) {
  Scan(tile, queries, selectors).run();
}

void measure(const HammingTile& tile, const HammingQueries& queries, int64_t query, uint32_t* distances) {
  measure_as_they_lie(tile, queries, query, distances);
}

}  // namespace

const HammingKernel kHammingSlicedNeon = {
    Scan::tile_codes, no_layout_bytes,     Scan::query_bytes, no_layout,    prepare_queries, scan,
    measure,          8 * kMaxSlicedWords, Scan::kQueries,    kLeastQueries};

}  // namespace hashengine

#endif
