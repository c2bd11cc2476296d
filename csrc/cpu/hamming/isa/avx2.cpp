// Hamming search with AVX2, which has no vector population count. Tables replace it: they give the distance between two
// nibbles.
//
// Layout. A tile consists of groups of 32 codes, and a group consists of planes. Plane j holds nibble j of every code,
// one byte per code. For a query, vpshufb looks up the 32 distances of a plane in the table of the query's nibble j.
//
// Cost. A distance of 0 to 4 fits in half a byte, so one table serves two queries. The values of three planes are
// summed before the two halves are separated. Comparing 12 bits of 32 codes with two queries takes 10 instructions.
// A distance between codes of b bits therefore takes b / 77 instructions.
//
// Long codes. Sums are bytes, so one comparison tests 32 of them against the bound. A byte can hold the sum of 63
// planes. Longer codes are summed in blocks of at most 63 planes, in bytes that saturate. Before each block but the
// first, an equal share of the bound is subtracted from the sum. A code is a hit if its final sum is below the rest of
// the bound, or if a subtraction went below zero. The exact distance then decides whether the hit becomes a candidate.

#include "cpu/hamming/kernel.h"

#ifdef HE_X86

#include <immintrin.h>

namespace hashengine {
namespace {

constexpr int64_t kGroup = 32;                // codes per vector of bytes
constexpr int64_t kGroups = 4;                // groups that share each load of a table
constexpr int64_t kBatch = kGroup * kGroups;  // codes that are scanned together
constexpr int64_t kMaxBlockPlanes = 63;       // a byte can sum their distances: 63 * 4 < 256
// Blocks are multiples of three planes, so a block may have almost three planes more than the average.
constexpr int64_t kMeanBlockPlanes = kMaxBlockPlanes - 3;
static_assert(kBatch == kDistancesMultiple);

using Vector = __m256i;

int64_t tile_bytes(int64_t codes, int64_t code_bytes) { return round_up(codes, kBatch) * 2 * code_bytes; }
int64_t tile_codes(int64_t code_bytes) { return std::max(kTileBytes / (2 * code_bytes) / kBatch * kBatch, kBatch); }
int64_t query_bytes(int64_t code_bytes) { return 2 * code_bytes * 16; }

// Writes a table of 16 bytes for each nibble of each pair of queries: entry n is popcount(n ^ nibble), in its lower
// half for the first query and in its upper half for the second. The high nibble of a byte precedes the low one. The
// tables of a pair are stored at the offset of its first query; a last query without a partner is paired with itself.
void prepare_queries(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared) {
  const auto nibble = [&](int64_t query, int64_t plane) {
    const uint8_t byte = queries[query * code_bytes + plane / 2];
    return plane % 2 ? byte & 15u : byte >> 4;
  };
  for (int64_t q = 0; q < count; q += 2) {
    uint8_t* const tables = prepared + q * query_bytes(code_bytes);
    for (int64_t plane = 0; plane < 2 * code_bytes; ++plane) {
      const unsigned first = nibble(q, plane), second = nibble(std::min(q + 1, count - 1), plane);
      for (unsigned n = 0; n < 16; ++n)
        tables[16 * plane + n] = uint8_t(__builtin_popcount(n ^ first) | __builtin_popcount(n ^ second) << 4);
    }
  }
}

HE_INLINE long long load_word(const uint8_t* bytes) {
  long long word;
  std::memcpy(&word, bytes, 8);
  return word;
}

// Reads eight bytes of each of 32 codes, those of code i at source + i * stride, and transposes them: bytes[j] holds
// byte j of every code, in order.
HE_TARGET_AVX2 HE_INLINE void transpose_words(const uint8_t* source, int64_t stride, Vector bytes[8]) {
  Vector x[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r)
    x[r] = _mm256_set_epi64x(load_word(source + (r + 24) * stride), load_word(source + (r + 16) * stride),
                             load_word(source + (r + 8) * stride), load_word(source + r * stride));
  // The steps interleave the bytes of two codes, then of four, then of eight. The last step appends the next eight
  // codes.
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
  for (int i = 0; i < 2; ++i) {  // bytes 0 to 3, then 4 to 7
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

// Pads the last batch with zero codes, which a scan never pushes.
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

// The sums of a block of planes, in bytes, for both queries of a pair.
struct Sums {
  Vector first[kGroups];
  Vector second[kGroups];
};

// Adds kPlanes planes, at most three, starting with `plane`.
template <int kPlanes>
HE_TARGET_AVX2 HE_INLINE void add_planes(const Vector* planes, int64_t group_planes, const uint8_t* tables,
                                         int64_t plane, Sums& sums) {
  const Vector low_half = _mm256_set1_epi8(15);
  Vector table[kPlanes];
#pragma GCC unroll 3
  for (int i = 0; i < kPlanes; ++i)
    table[i] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(tables) + plane + i));
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    const Vector* nibbles = planes + g * group_planes + plane;
    Vector both = _mm256_shuffle_epi8(table[0], nibbles[0]);
#pragma GCC unroll 3
    for (int i = 1; i < kPlanes; ++i) both = _mm256_add_epi8(both, _mm256_shuffle_epi8(table[i], nibbles[i]));
    sums.first[g] = _mm256_add_epi8(sums.first[g], _mm256_and_si256(both, low_half));
    sums.second[g] = _mm256_add_epi8(sums.second[g], _mm256_and_si256(_mm256_srli_epi16(both, 4), low_half));
  }
}

int64_t block_count(int64_t planes) { return (planes + kMeanBlockPlanes - 1) / kMeanBlockPlanes; }

// The first plane of a block. Blocks are as equal as multiples of three planes allow, because an equal share of the
// bound is subtracted for each.
HE_INLINE int64_t begin_of_block(int64_t block, int64_t planes, int64_t blocks) {
  return block == blocks ? planes : block * planes / blocks / 3 * 3;
}

// Sums planes [begin, end), at most kMaxBlockPlanes.
HE_TARGET_AVX2 HE_INLINE Sums sum_block(const Vector* planes, int64_t group_planes, const uint8_t* tables,
                                        int64_t begin, int64_t end) {
  Sums sums;
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) sums.first[g] = sums.second[g] = _mm256_setzero_si256();
  int64_t plane = begin;
#pragma GCC unroll 2
  for (; plane + 3 <= end; plane += 3) add_planes<3>(planes, group_planes, tables, plane, sums);
  if (end - plane == 2) add_planes<2>(planes, group_planes, tables, plane, sums);
  if (end - plane == 1) add_planes<1>(planes, group_planes, tables, plane, sums);
  return sums;
}

// A bound divided between the blocks of planes: `share` is subtracted before each block but the first, and the final
// sum is compared with `rest`. rest + share * (blocks - 1) is the bound. Exception: if a single block has a bound above
// 255, `rest` is 255, which is above every sum.
struct ByteBound {
  Vector rest;
  Vector share;

  HE_TARGET_AVX2 static HE_INLINE ByteBound divide(int64_t bound, int64_t blocks) {
    const int64_t excess = std::max<int64_t>(bound - 255, 0);
    const int64_t share = blocks > 1 ? (excess + blocks - 2) / (blocks - 1) : 0;
    const int64_t rest = std::min<int64_t>(bound - share * (blocks - 1), 255);
    return {_mm256_set1_epi8(char(std::max<int64_t>(rest, 0))), _mm256_set1_epi8(char(share))};
  }
};

HE_TARGET_AVX2 HE_INLINE uint32_t nonzero_bytes(Vector v) {
  return ~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
}

HE_TARGET_AVX2 HE_INLINE bool is_zero(const Vector (&hits)[kGroups]) {
  const Vector any = _mm256_or_si256(_mm256_or_si256(hits[0], hits[1]), _mm256_or_si256(hits[2], hits[3]));
  return _mm256_testz_si256(any, any);
}

// Pushes each code of a batch whose byte in `hits` is not zero. `sums` contains the distances if a code is a single
// block of planes; otherwise it is null. This path is rare. It is not inlined, so that it takes no registers from the
// loop.
HE_TARGET_AVX2 __attribute__((noinline)) void push_hits(const Vector (&hits)[kGroups], const Vector* sums,
                                                        const HammingTile& tile, int64_t first_code,
                                                        const uint8_t* query, Selector& selector) {
  alignas(32) uint8_t distances[kBatch];
  if (sums)
    for (int g = 0; g < kGroups; ++g) _mm256_store_si256(reinterpret_cast<Vector*>(distances) + g, sums[g]);
  const int64_t present = std::min(tile.count - first_code, kBatch);
  for (int64_t half = 0; half < 2; ++half) {
    uint64_t remaining = nonzero_bytes(hits[2 * half]) | uint64_t(nonzero_bytes(hits[2 * half + 1])) << 32;
    for (; remaining; remaining &= remaining - 1) {
      const int64_t i = 64 * half + __builtin_ctzll(remaining), code = first_code + i;
      if (i >= present) return;
      const uint32_t distance =
          sums ? distances[i] : hamming_distance(query, tile.codes + code * tile.code_bytes, tile.code_bytes);
      selector.push(distance, tile.position_of(code));
    }
  }
}

// Scans the whole tile for a pair of queries (kQueries = 2) or for a last query without a partner (1). kPlanes: the
// number of planes as a constant, if they are one block; 0: any number.
template <int kQueries, int kPlanes>
HE_TARGET_AVX2 void scan_pair(const HammingTile& tile, const uint8_t* tables, const uint8_t* queries,
                              Selector* selectors) {
  const int64_t group_planes = kPlanes ? kPlanes : 2 * tile.code_bytes;
  const int64_t blocks = kPlanes ? 1 : block_count(group_planes);
  const auto block_begin = [&](int64_t block) { return begin_of_block(block, group_planes, blocks); };
  const auto* planes = reinterpret_cast<const Vector*>(tile.prepared);
  ByteBound bounds[kQueries];
  for (int q = 0; q < kQueries; ++q) bounds[q] = ByteBound::divide(selectors[q].bound(), blocks);
  for (int64_t code = 0; code < tile.count; code += kBatch, planes += kGroups * group_planes) {
    Sums sums = sum_block(planes, group_planes, tables, 0, kPlanes ? kPlanes : block_begin(1));
    Vector hits[2][kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) hits[0][g] = hits[1][g] = _mm256_setzero_si256();
    for (int64_t block = 1; block < blocks && !kPlanes; ++block) {
      const Sums more = sum_block(planes, group_planes, tables, block_begin(block), block_begin(block + 1));
#pragma GCC unroll 2
      for (int q = 0; q < kQueries; ++q) {
        Vector* const total = q ? sums.second : sums.first;
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) {
          hits[q][g] = _mm256_or_si256(hits[q][g], _mm256_subs_epu8(bounds[q].share, total[g]));
          total[g] = _mm256_adds_epu8(_mm256_subs_epu8(total[g], bounds[q].share), q ? more.second[g] : more.first[g]);
        }
      }
    }
#pragma GCC unroll 2
    for (int q = 0; q < kQueries; ++q) {
      const Vector* const total = q ? sums.second : sums.first;
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g)
        hits[q][g] = _mm256_or_si256(hits[q][g], _mm256_subs_epu8(bounds[q].rest, total[g]));
      if (__builtin_expect(is_zero(hits[q]), 1)) continue;
      push_hits(hits[q], blocks == 1 ? total : nullptr, tile, code, queries + q * tile.code_bytes, selectors[q]);
      bounds[q] = ByteBound::divide(selectors[q].bound(), blocks);
    }
  }
}

void scan(const HammingTile& tile, const QueryBlock& queries, Selector* selectors) {
  const auto scan_two = tile.code_bytes == 4    ? scan_pair<2, 8>
                        : tile.code_bytes == 8  ? scan_pair<2, 16>
                        : tile.code_bytes == 16 ? scan_pair<2, 32>
                                                : scan_pair<2, 0>;
  for (int64_t q = 0; q < queries.count; q += 2) {
    const auto scan_queries = q + 1 < queries.count ? scan_two : scan_pair<1, 0>;
    scan_queries(tile, queries.prepared + q * query_bytes(tile.code_bytes), queries.codes + q * tile.code_bytes,
                 selectors + q);
  }
}

HE_TARGET_AVX2 void compute_byte_distances(const HammingTile& tile, const QueryBlock& queries, int64_t query,
                                           uint8_t* first, uint8_t* second) {
  static_assert(2 * kMaxByteDistanceBytes <= kMaxBlockPlanes);
  const int64_t group_planes = 2 * tile.code_bytes;
  const uint8_t* const tables = queries.prepared + query * query_bytes(tile.code_bytes);
  const auto* planes = reinterpret_cast<const Vector*>(tile.prepared);
  for (int64_t code = 0; code < tile.count; code += kBatch, planes += kGroups * group_planes) {
    const Sums sums = sum_block(planes, group_planes, tables, 0, group_planes);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      _mm256_storeu_si256(reinterpret_cast<Vector*>(first + code) + g, sums.first[g]);
      _mm256_storeu_si256(reinterpret_cast<Vector*>(second + code) + g, sums.second[g]);
    }
  }
}

// Adds the bytes to the distances of 32 codes, or writes them if they are the first.
HE_TARGET_AVX2 HE_INLINE void add_bytes(Vector bytes, bool is_first, uint16_t* distances) {
  auto* const to = reinterpret_cast<Vector*>(distances);
  const Vector halves[2] = {_mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes)),
                            _mm256_cvtepu8_epi16(_mm256_extracti128_si256(bytes, 1))};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    _mm256_storeu_si256(to + i, is_first ? halves[i] : _mm256_add_epi16(_mm256_loadu_si256(to + i), halves[i]));
}

HE_TARGET_AVX2 void compute_short_distances(const HammingTile& tile, const QueryBlock& queries, int64_t query,
                                            uint16_t* first, uint16_t* second) {
  const int64_t group_planes = 2 * tile.code_bytes, blocks = block_count(group_planes);
  const uint8_t* const tables = queries.prepared + query * query_bytes(tile.code_bytes);
  const auto* planes = reinterpret_cast<const Vector*>(tile.prepared);
  for (int64_t code = 0; code < tile.count; code += kBatch, planes += kGroups * group_planes) {
    for (int64_t block = 0; block < blocks; ++block) {
      const Sums sums = sum_block(planes, group_planes, tables, begin_of_block(block, group_planes, blocks),
                                  begin_of_block(block + 1, group_planes, blocks));
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        add_bytes(sums.first[g], block == 0, first + code + g * kGroup);
        add_bytes(sums.second[g], block == 0, second + code + g * kGroup);
      }
    }
  }
}

}  // namespace

const HammingKernel kHammingAvx2 = {tile_codes,
                                    tile_bytes,
                                    query_bytes,
                                    prepare_tile,
                                    prepare_queries,
                                    scan,
                                    nullptr,
                                    compute_byte_distances,
                                    compute_short_distances,
                                    1024,  // bytes; for longer codes, isa/popcnt.cpp is as fast
                                    0,
                                    0};

}  // namespace hashengine

#endif
