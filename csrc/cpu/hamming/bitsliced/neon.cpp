#include "cpu/hamming/kernel.h"

#ifdef HE_ARM

#define HE_BITSLICED_TARGET  // every aarch64 CPU has NEON
#include "cpu/hamming/bitsliced/scan.h"

namespace hashengine {
namespace {

struct Level {
  typedef uint64_t Vector __attribute__((vector_size(16)));

  // The carry of each bit is the bit of c if the bits of the sum and of b differ, otherwise the bit of the sum. This is
  // one instruction, a bitwise select.
  static HE_BITSLICED Vector full_add(Vector& sum, Vector b, Vector c) {
    const Vector either = sum ^ b, carry = (either & c) | (~either & sum);
    sum = either ^ c;
    return carry;
  }
  static HE_BITSLICED bool has_zero(Vector v) { return (v[0] & v[1]) != ~uint64_t(0); }
  static HE_BITSLICED uint32_t words_with_zero(Vector v) {
    return uint32_t(v[0] != ~uint64_t(0)) | uint32_t(v[1] != ~uint64_t(0)) << 1;
  }
};
using Scan = BitslicedScan<Level>;

constexpr int64_t kMinQueries = 64;  // an estimate; with fewer queries, isa/neon.cpp should be faster

void prepare_queries(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared) {
  Scan::prepare_queries(queries, count, code_bytes, prepared);
}

void scan(const HammingTile& tile, const QueryBlock& queries, Selector* selectors) {
  Scan(tile, queries, selectors).run();
}

}  // namespace

const HammingKernel kHammingBitslicedNeon = {
    Scan::tile_codes, no_tile_bytes, Scan::query_bytes, prepare_nothing,        prepare_queries, scan,
    nullptr,          nullptr,       nullptr,           8 * kMaxBitslicedWords, Scan::kQueries,  kMinQueries};

}  // namespace hashengine

#endif
