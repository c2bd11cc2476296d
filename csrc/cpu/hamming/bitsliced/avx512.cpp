#include "cpu/hamming/kernel.h"

#ifdef HE_X86

#include <immintrin.h>

#define HE_BITSLICED_TARGET HE_TARGET_AVX512
#include "cpu/hamming/bitsliced/scan.h"

// Loads two vectors into registers. Otherwise the compiler makes each a memory operand of both instructions of a full
// adder, which load it twice. The tests define this macro to be empty, because their vectors fit in no register.
#ifndef HE_KEEP_IN_REGISTERS
#define HE_KEEP_IN_REGISTERS(a, b) asm("" : "+v"(a), "+v"(b))
#endif

namespace hashengine {
namespace {

struct Level {
  typedef uint64_t Vector __attribute__((vector_size(64)));

  static HE_BITSLICED Vector full_add(Vector& sum, Vector b, Vector c) {
    const auto x = cast<__m512i>(sum);
    auto y = cast<__m512i>(b), z = cast<__m512i>(c);
    HE_KEEP_IN_REGISTERS(y, z);
    sum = cast<Vector>(_mm512_ternarylogic_epi64(x, y, z, 0x96));   // bits set in exactly one or in all three
    return cast<Vector>(_mm512_ternarylogic_epi64(x, y, z, 0xe8));  // bits set in at least two
  }
  static HE_BITSLICED uint32_t words_with_zero(Vector v) {
    const __m512i inverted = _mm512_xor_si512(cast<__m512i>(v), _mm512_set1_epi64(-1));
    return _mm512_test_epi64_mask(inverted, inverted);
  }
  static HE_BITSLICED bool has_zero(Vector v) { return words_with_zero(v) != 0; }

 private:
  template <typename To, typename From>
  static HE_BITSLICED To cast(const From& from) {
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
  }
};
using Scan = BitslicedScan<Level>;

constexpr int64_t kMinQueries = 288;  // with fewer, almost half of the 512 bits of a vector would be unused

HE_TARGET_AVX512 void prepare_queries(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared) {
  Scan::prepare_queries(queries, count, code_bytes, prepared);
}

HE_TARGET_AVX512 void scan(const HammingTile& tile, const QueryBlock& queries, Selector* selectors) {
  Scan(tile, queries, selectors).run();
}

}  // namespace

const HammingKernel kHammingBitslicedAvx512 = {
    Scan::tile_codes, no_tile_bytes, Scan::query_bytes, prepare_nothing,        prepare_queries, scan,
    nullptr,          nullptr,       nullptr,           8 * kMaxBitslicedWords, Scan::kQueries,  kMinQueries};

}  // namespace hashengine

#endif
