#include "cpu/hamming/kernel.h"

#ifdef HE_X86

#include <immintrin.h>

#define HE_BITSLICED_TARGET HE_TARGET_AVX2
#include "cpu/hamming/bitsliced/scan.h"

namespace hashengine {
namespace {

struct Level {
  typedef uint64_t Vector __attribute__((vector_size(32)));

  static HE_BITSLICED Vector full_add(Vector& sum, Vector b, Vector c) {
    const Vector either = sum ^ b, carry = (sum & b) | (either & c);
    sum = either ^ c;
    return carry;
  }
  static HE_BITSLICED bool has_zero(Vector v) { return !_mm256_testc_si256(__m256i(v), _mm256_set1_epi64x(-1)); }
  static HE_BITSLICED uint32_t words_with_zero(Vector v) {
    const __m256i is_full = _mm256_cmpeq_epi64(__m256i(v), _mm256_set1_epi64x(-1));
    return uint32_t(~_mm256_movemask_pd(__m256d(is_full))) & 15;
  }
};
using Scan = BitslicedScan<Level>;

constexpr int64_t kMinQueries = 144;  // with fewer queries, the kernel of isa/avx2.cpp was faster in a measurement

HE_TARGET_AVX2 void prepare_queries(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared) {
  Scan::prepare_queries(queries, count, code_bytes, prepared);
}

HE_TARGET_AVX2 void scan(const HammingTile& tile, const QueryBlock& queries, Selector* selectors) {
  Scan(tile, queries, selectors).run();
}

}  // namespace

const HammingKernel kHammingBitslicedAvx2 = {
    Scan::tile_codes, no_tile_bytes, Scan::query_bytes, prepare_nothing,        prepare_queries, scan,
    nullptr,          nullptr,       nullptr,           8 * kMaxBitslicedWords, Scan::kQueries,  kMinQueries};

}  // namespace hashengine

#endif
