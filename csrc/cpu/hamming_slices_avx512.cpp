#include "hamming_kernel.h"

#ifdef HE_X86

#include <immintrin.h>

#define HE_SLICES_TARGET HE_TARGET_AVX512
#include "hamming_slices.h"

namespace hashengine {
namespace {

struct Slices {
  typedef uint64_t Vector __attribute__((vector_size(64)));

  static HE_SLICES Vector full_add(Vector& sum, Vector b, Vector c) {
    const auto x = cast<__m512i>(sum), y = cast<__m512i>(b), z = cast<__m512i>(c);
    sum = cast<Vector>(_mm512_ternarylogic_epi64(x, y, z, 0x96));   // one or three of them
    return cast<Vector>(_mm512_ternarylogic_epi64(x, y, z, 0xe8));  // two or three
  }
  static HE_SLICES bool has_zero(Vector v) {
    const __m512i inverted = _mm512_xor_si512(cast<__m512i>(v), _mm512_set1_epi64(-1));
    return _mm512_test_epi64_mask(inverted, inverted) != 0;
  }

 private:
  template <typename To, typename From>
  static HE_SLICES To cast(const From& from) {
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
  }
};
using Scan = SlicedScan<Slices>;

constexpr int64_t kLeastQueries = 288;  // estimated: fewer are faster with the population count

HE_TARGET_AVX512 void prepare_queries(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared) {
  Scan::prepare_queries(queries, count, code_bytes, prepared);
}

HE_TARGET_AVX512 void scan(const HammingTile& tile, const HammingQueries& queries, Selector* selectors) {
  Scan(tile, queries, selectors).run();
}

HE_TARGET_AVX512 void measure(const HammingTile& tile, const HammingQueries& queries, int64_t query,
                              uint32_t* distances) {
  measure_as_they_lie(tile, queries, query, distances);
}

}  // namespace

const HammingKernel kHammingSlicedAvx512 = {
    Scan::tile_codes, no_layout_bytes,     Scan::query_bytes, no_layout,    prepare_queries, scan,
    measure,          8 * kMaxSlicedWords, Scan::kQueries,    kLeastQueries};

}  // namespace hashengine

#endif
