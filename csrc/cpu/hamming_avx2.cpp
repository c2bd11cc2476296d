// Hamming search with AVX2, which has no population count: a table of one query nibble's sixteen distances stands in.
//
// A tile is laid out in groups of 32 codes, and a group in planes: plane j holds nibble j of every code, a byte each. For
// one query, vpshufb looks up the 32 distances of a plane in the table of the query's nibble j, and one addition gathers
// them: 2 instructions for 4 bits of 32 codes, so bits / 64 instructions a distance; on a core with two shuffle units
// that is 4 distances a cycle at 64 bits. Distances lie in bytes, so one comparison tests 32 of them against the bound.
//
// Byte sums saturate at 255, which is exact for bounds up to 255 (and for any bound up to 248 bits). Above, sums are
// widened to 16 bits every 60 planes.

#include "hamming_kernel.h"

#ifdef HE_X86

#include <immintrin.h>

#include <cstring>

namespace hashengine {
namespace {

constexpr int64_t kGroup = 32;     // codes in a vector of bytes
constexpr int64_t kGroups = 4;     // groups that share the loading of a table
constexpr int64_t kBatch = kGroup * kGroups;
constexpr int64_t kPlanesOfBytes = 60;  // planes that a byte can sum: 60 * 4 < 256

using Vector = __m256i;

#define HE_INLINE inline __attribute__((always_inline))

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t tile_bytes(int64_t codes, int64_t code_bytes) { return round_up(codes, kBatch) * 2 * code_bytes; }
int64_t tile_codes(int64_t code_bytes) {
  return std::max(kTileBytes / (2 * code_bytes) / kBatch * kBatch, kBatch);
}
int64_t query_bytes(int64_t code_bytes) { return 2 * code_bytes * 16; }

// One table of 16 bytes a nibble: entry n is popcount(n ^ nibble). A byte's high nibble comes first.
void prepare_query(const uint8_t* query, int64_t code_bytes, uint8_t* tables) {
  for (int64_t plane = 0; plane < 2 * code_bytes; ++plane) {
    const unsigned nibble = plane % 2 ? query[plane / 2] & 15u : query[plane / 2] >> 4;
    for (unsigned n = 0; n < 16; ++n) tables[16 * plane + n] = uint8_t(__builtin_popcount(n ^ nibble));
  }
}

HE_INLINE long long load_word(const uint8_t* bytes) {
  long long word;
  std::memcpy(&word, bytes, 8);
  return word;
}

// Eight bytes of each of 32 codes, the first at `source`, to eight vectors: the j-th holds byte j of every code in order.
HE_TARGET_AVX2 HE_INLINE void transpose_words(const uint8_t* source, int64_t stride, Vector bytes[8]) {
  Vector x[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r)
    x[r] = _mm256_set_epi64x(load_word(source + (r + 24) * stride), load_word(source + (r + 16) * stride),
                             load_word(source + (r + 8) * stride), load_word(source + r * stride));
  // Each step interleaves neighbours: bytes, then pairs, then quadruples of codes, then the two halves of a lane.
  Vector pairs[8], quads[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    pairs[i] = _mm256_unpacklo_epi8(x[2 * i], x[2 * i + 1]);
    pairs[i + 4] = _mm256_unpackhi_epi8(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int from = i / 2 * 4 + i % 2 * 2, to = i / 2 * 4 + i % 2;
    quads[to] = _mm256_unpacklo_epi16(pairs[from], pairs[from + 1]);
    quads[to + 2] = _mm256_unpackhi_epi16(pairs[from], pairs[from + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // bytes 0..3, then bytes 4..7
    const Vector low_first = _mm256_unpacklo_epi32(quads[2 * i], quads[2 * i + 1]);
    const Vector low_last = _mm256_unpackhi_epi32(quads[2 * i], quads[2 * i + 1]);
    const Vector high_first = _mm256_unpacklo_epi32(quads[4 + 2 * i], quads[5 + 2 * i]);
    const Vector high_last = _mm256_unpackhi_epi32(quads[4 + 2 * i], quads[5 + 2 * i]);
    bytes[4 * i] = _mm256_unpacklo_epi64(low_first, high_first);
    bytes[4 * i + 1] = _mm256_unpackhi_epi64(low_first, high_first);
    bytes[4 * i + 2] = _mm256_unpacklo_epi64(low_last, high_last);
    bytes[4 * i + 3] = _mm256_unpackhi_epi64(low_last, high_last);
  }
}

// Codes beyond `count` in the last batch are zero; a scan never offers them.
HE_TARGET_AVX2 void prepare_tile(const uint8_t* codes, int64_t count, int64_t code_bytes, uint8_t* tile) {
  const Vector low_nibble = _mm256_set1_epi8(15);
  const int64_t groups = round_up(count, kBatch) / kGroup;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t present = std::clamp<int64_t>(count - group * kGroup, 0, kGroup);
    for (int64_t first_byte = 0; first_byte < code_bytes; first_byte += 8) {
      const int64_t width = std::min<int64_t>(8, code_bytes - first_byte);
      const uint8_t* source = codes + group * kGroup * code_bytes + first_byte;
      Vector bytes[8];
      if (present == kGroup && width == 8) {
        transpose_words(source, code_bytes, bytes);
      } else {
        uint8_t padded[kGroup * 8] = {};
        for (int64_t i = 0; i < present; ++i) std::memcpy(padded + 8 * i, source + i * code_bytes, size_t(width));
        transpose_words(padded, 8, bytes);
      }
      auto* planes = reinterpret_cast<Vector*>(tile + (group * code_bytes + first_byte) * 2 * kGroup);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        if (j >= width) break;
        _mm256_store_si256(planes + 2 * j, _mm256_and_si256(_mm256_srli_epi16(bytes[j], 4), low_nibble));
        _mm256_store_si256(planes + 2 * j + 1, _mm256_and_si256(bytes[j], low_nibble));
      }
    }
  }
}

// Keeps a value in a register: as a memory operand it would be loaded once a query, and loads are scarce here.
#define HE_IN_REGISTER(vector) asm("" : "+x"(vector))

// Adds the distances of planes [first, last) to the byte sums of kGroups groups and kQueries queries.
template <int kQueries>
HE_TARGET_AVX2 HE_INLINE void add_planes(const Vector* planes, int64_t group_planes, const uint8_t* const tables[],
                                         int64_t first, int64_t last, Vector sums[kQueries][kGroups]) {
#pragma GCC unroll 4
  for (int64_t plane = first; plane < last; ++plane) {
    Vector nibbles[kGroups];
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      nibbles[g] = _mm256_load_si256(planes + g * group_planes + plane);
      HE_IN_REGISTER(nibbles[g]);
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      const Vector table =
          _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(tables[q] + 16 * plane)));
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g)
        sums[q][g] = _mm256_add_epi8(sums[q][g], _mm256_shuffle_epi8(table, nibbles[g]));
    }
  }
}

// Byte sums of all planes, saturated at 255. kPlanes is their number where it is known, else 0.
template <int kQueries, int kPlanes>
HE_TARGET_AVX2 HE_INLINE void sum_planes(const Vector* planes, int64_t group_planes, const uint8_t* const tables[],
                                         Vector sums[kQueries][kGroups]) {
#pragma GCC unroll 8
  for (int i = 0; i < kQueries * kGroups; ++i) sums[i / kGroups][i % kGroups] = _mm256_setzero_si256();
  if (kPlanes) {
    add_planes<kQueries>(planes, kPlanes, tables, 0, kPlanes, sums);
    return;
  }
  add_planes<kQueries>(planes, group_planes, tables, 0, std::min(group_planes, kPlanesOfBytes), sums);
  for (int64_t first = kPlanesOfBytes; first < group_planes; first += kPlanesOfBytes) {
    Vector more[kQueries][kGroups];
#pragma GCC unroll 8
    for (int i = 0; i < kQueries * kGroups; ++i) more[i / kGroups][i % kGroups] = _mm256_setzero_si256();
    add_planes<kQueries>(planes, group_planes, tables, first, std::min(first + kPlanesOfBytes, group_planes), more);
#pragma GCC unroll 8
    for (int i = 0; i < kQueries * kGroups; ++i)
      sums[i / kGroups][i % kGroups] = _mm256_adds_epu8(sums[i / kGroups][i % kGroups], more[i / kGroups][i % kGroups]);
  }
}

HE_TARGET_AVX2 HE_INLINE uint32_t below_bytes(Vector sums, Vector bound) {
  return ~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(sums, bound), sums)));
}

// Offers the hits of one group; `hits` has a bit a code. Not inlined: it is the rare path, and needs no registers kept.
template <typename Sum>
__attribute__((noinline)) void offer_hits(uint32_t hits, const Sum* sums, const HammingTile& tile, int64_t first_code,
                                          Selector& selector) {
  for (; hits; hits &= hits - 1) {
    const int64_t i = __builtin_ctz(hits);
    if (first_code + i < tile.count) selector.offer(sums[i], tile.position + uint32_t(first_code + i));
  }
}

// The whole tile against kQueries queries whose bounds fit a byte.
template <int kQueries, int kPlanes>
HE_TARGET_AVX2 void scan_bytes(const HammingTile& tile, const uint8_t* const tables[], Selector* selectors) {
  const int64_t group_planes = kPlanes ? kPlanes : 2 * tile.code_bytes;
  const auto* planes = reinterpret_cast<const Vector*>(tile.rows);
  Vector bounds[kQueries];
  for (int q = 0; q < kQueries; ++q) bounds[q] = _mm256_set1_epi8(char(std::min<uint32_t>(selectors[q].bound(), 255)));
  for (int64_t code = 0; code < tile.count; code += kBatch, planes += kGroups * group_planes) {
    Vector sums[kQueries][kGroups];
    sum_planes<kQueries, kPlanes>(planes, group_planes, tables, sums);
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      const Vector least =
          _mm256_min_epu8(_mm256_min_epu8(sums[q][0], sums[q][1]), _mm256_min_epu8(sums[q][2], sums[q][3]));
      if (__builtin_expect(below_bytes(least, bounds[q]) == 0, 1)) continue;
      alignas(32) uint8_t distances[kBatch];
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g)
        _mm256_store_si256(reinterpret_cast<Vector*>(distances) + g, sums[q][g]);
      for (int g = 0; g < kGroups; ++g) {
        const Vector group_sums = _mm256_load_si256(reinterpret_cast<Vector*>(distances) + g);
        if (const uint32_t hits = below_bytes(group_sums, bounds[q]))
          offer_hits(hits, distances + g * kGroup, tile, code + g * kGroup, selectors[q]);
      }
      bounds[q] = _mm256_set1_epi8(char(std::min<uint32_t>(selectors[q].bound(), 255)));
    }
  }
}

// The same for one query with a larger bound: sums of 16 bits.
HE_TARGET_AVX2 void scan_wide(const HammingTile& tile, const uint8_t* tables, Selector& selector) {
  const int64_t group_planes = 2 * tile.code_bytes;
  const auto* planes = reinterpret_cast<const Vector*>(tile.rows);
  const Vector zero = _mm256_setzero_si256();
  for (int64_t code = 0; code < tile.count; code += kBatch, planes += kGroups * group_planes) {
    Vector low[kGroups] = {zero, zero, zero, zero};   // codes 0..7 and 16..23, as unpacking leaves them
    Vector high[kGroups] = {zero, zero, zero, zero};  // codes 8..15 and 24..31
    for (int64_t first = 0; first < group_planes; first += kPlanesOfBytes) {
      Vector sums[1][kGroups] = {{zero, zero, zero, zero}};
      add_planes<1>(planes, group_planes, &tables, first, std::min(first + kPlanesOfBytes, group_planes), sums);
      for (int g = 0; g < kGroups; ++g) {
        low[g] = _mm256_add_epi16(low[g], _mm256_unpacklo_epi8(sums[0][g], zero));
        high[g] = _mm256_add_epi16(high[g], _mm256_unpackhi_epi8(sums[0][g], zero));
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      const Vector bound = _mm256_set1_epi16(short(selector.bound()));
      const Vector is_below = _mm256_packs_epi16(_mm256_cmpgt_epi16(bound, low[g]), _mm256_cmpgt_epi16(bound, high[g]));
      const auto hits = uint32_t(_mm256_movemask_epi8(is_below));
      if (hits == 0) continue;
      alignas(32) uint16_t distances[kGroup];
      _mm256_store_si256(reinterpret_cast<Vector*>(distances), _mm256_permute2x128_si256(low[g], high[g], 0x20));
      _mm256_store_si256(reinterpret_cast<Vector*>(distances + 16), _mm256_permute2x128_si256(low[g], high[g], 0x31));
      offer_hits(hits, distances, tile, code + g * kGroup, selector);
    }
  }
}

void scan(const HammingTile& tile, const uint8_t* prepared, int64_t query_count, Selector* selectors) {
  const int64_t stride = query_bytes(tile.code_bytes);
  const bool always_bytes = 8 * tile.code_bytes < 255;
  const auto fits_byte = [&](int64_t q) { return always_bytes || selectors[q].bound() <= 255; };
  const auto scan_pair = tile.code_bytes == 8    ? scan_bytes<2, 16>
                         : tile.code_bytes == 16 ? scan_bytes<2, 32>
                                                 : scan_bytes<2, 0>;
  for (int64_t q = 0; q < query_count;) {
    const uint8_t* const tables[] = {prepared + q * stride, prepared + (q + 1) * stride};
    if (!fits_byte(q)) {
      scan_wide(tile, tables[0], selectors[q++]);
    } else if (q + 1 < query_count && fits_byte(q + 1)) {
      scan_pair(tile, tables, selectors + q);
      q += 2;
    } else {
      scan_bytes<1, 0>(tile, tables, selectors + q++);
    }
  }
}

}  // namespace

const HammingKernel kHammingAvx2 = {tile_codes, tile_bytes,    query_bytes, prepare_tile,
                                    prepare_query, scan, 4000};  // bounds stay below 2^15

}  // namespace hashengine

#endif
