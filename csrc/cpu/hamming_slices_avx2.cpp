#include "hamming_kernel.h"

#ifdef HE_X86

#include <immintrin.h>

#define HE_SLICES_TARGET HE_TARGET_AVX2
#include "hamming_slices.h"

namespace hashengine {
namespace {

struct Slices {
  typedef uint64_t Vector __attribute__((vector_size(32)));

  static HE_SLICES Vector full_add(Vector& sum, Vector b, Vector c) {
    const Vector either = sum ^ b, carry = (sum & b) | (either & c);
    sum = either ^ c;
    return carry;
  }
  static HE_SLICES bool has_zero(Vector v) { return !_mm256_testc_si256(__m256i(v), _mm256_set1_epi64x(-1)); }
};
using Scan = SlicedScan<Slices>;

constexpr int64_t kLeastQueries = 144;  // fewer are faster with tables of nibbles (hamming_avx2.cpp)

HE_TARGET_AVX2 void prepare_queries(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared) {
  Scan::prepare_queries(queries, count, code_bytes, prepared);
}

HE_TARGET_AVX2 void scan(const HammingTile& tile, const HammingQueries& queries, Selector* selectors) {
  Scan(tile, queries, selectors).run();
}

HE_TARGET_AVX2 void measure(const HammingTile& tile, const HammingQueries& queries, int64_t query,
                            uint32_t* distances) {
  measure_as_they_lie(tile, queries, query, distances);
}

}  // namespace

const HammingKernel kHammingSlicedAvx2 = {
    Scan::tile_codes, no_layout_bytes,     Scan::query_bytes, no_layout,    prepare_queries, scan,
    measure,          8 * kMaxSlicedWords, Scan::kQueries,    kLeastQueries};

}  // namespace hashengine

#endif
