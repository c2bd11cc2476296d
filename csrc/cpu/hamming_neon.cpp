// Hamming search with NEON, which counts the bits of every byte: xor, cnt and add, 3 instructions for 16 bytes.
//
// Codes are read as they lie. The bytes of a code must add up across a vector, and addp does that for two vectors at
// once: 16 vectors of counts become one of 16 sums in 15 additions, as many as if a layout had put the same byte of 16
// codes into each vector. So no tile has to be laid out, no query's bytes broadcast, and a single query needs no scan
// of its own. Four queries share the loading of four vectors of codes, and the 16 vectors of counts stay in registers.
//
// Up to 128 bits a distance is a byte, so that one comparison tests 16. Longer codes add neighbours in bytes while
// those hold the sums, then in 16 bits. A byte holds the counts of 31 vectors; of longer codes each such block is added
// to 16 bits, 1 instruction in 93, which keeps distances exact where shares of a bound in bytes would take 3 and a
// second look. In all, with loads, test and loop, as GCC 12 compiles it, for 16 distances: 16 instructions at 32 bits,
// 31 at 64, 60 at 128, 124 at 256, 183 at 384, 285 at 512, 422 at 768, 551 at 1024; elsewhere 59 for every 128 bits and
// about 80.

#include "hamming_kernel.h"

#ifdef HE_ARM

#include <arm_neon.h>

#include <type_traits>

namespace hashengine {
namespace {

constexpr int kSums = 16;    // vectors of counts, which the registers hold beside what they are made of
constexpr int kQueries = 4;  // that share the loading of codes
constexpr int64_t kVector = 16;
constexpr int64_t kBlock = 31 * kVector;  // bytes of a code whose counts a byte can sum: 31 * 8 < 256

using Bytes = uint8x16_t;
using Shorts = uint16x8_t;

// A code's bytes in a row: 4, 8 or whole vectors. Codes of other lengths are padded with zeros.
int64_t row_bytes(int64_t code_bytes) {
  return code_bytes <= 4 ? 4 : code_bytes <= 8 ? 8 : round_up(code_bytes, kVector);
}

// Codes that one query scans together, the most there are in a group.
int64_t group_codes(int64_t row) { return kSums * std::max<int64_t>(kVector / row, 1); }

int64_t tile_codes(int64_t code_bytes) {
  const int64_t row = row_bytes(code_bytes), group = group_codes(row);
  return std::max(kTileBytes / row / group * group, group);
}
int64_t tile_bytes(int64_t codes, int64_t code_bytes) {
  const int64_t row = row_bytes(code_bytes);
  return row == code_bytes ? 0 : codes * row;
}
int64_t query_bytes(int64_t code_bytes) { return std::max(row_bytes(code_bytes), kVector); }

void pad(const uint8_t* code, int64_t code_bytes, int64_t row, uint8_t* to) {
  std::memcpy(to, code, size_t(code_bytes));
  std::memset(to + code_bytes, 0, size_t(row - code_bytes));
}

void prepare_tile(const uint8_t* codes, int64_t count, int64_t code_bytes, uint8_t* tile) {
  const int64_t row = row_bytes(code_bytes);
  if (row == code_bytes) return;
  for (int64_t i = 0; i < count; ++i) pad(codes + i * code_bytes, code_bytes, row, tile + i * row);
}

// A query fills a vector, as often as codes do.
void prepare_queries(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared) {
  const int64_t row = row_bytes(code_bytes), each = std::max(kVector / row, int64_t(1));
  for (int64_t i = 0; i < count * each; ++i) pad(queries + i / each * code_bytes, code_bytes, row, prepared + i * row);
}

const uint8_t* rows_of(const HammingTile& tile) {
  return row_bytes(tile.code_bytes) == tile.code_bytes ? tile.codes : tile.rows;
}

HE_INLINE Bytes add_pairs(Bytes a, Bytes b) { return vpaddq_u8(a, b); }
HE_INLINE Shorts add_pairs(Shorts a, Shorts b) { return vpaddq_u16(a, b); }
HE_INLINE Bytes is_below(Bytes a, Bytes b) { return vcltq_u8(a, b); }
HE_INLINE Bytes is_below(Shorts a, Shorts b) { return vreinterpretq_u8_u16(vcltq_u16(a, b)); }
HE_INLINE Bytes load(const uint8_t* from) { return vld1q_u8(from); }
HE_INLINE Shorts load(const uint16_t* from) { return vld1q_u16(from); }
HE_INLINE void store(uint8_t* to, Bytes v) { vst1q_u8(to, v); }
HE_INLINE void store(uint16_t* to, Shorts v) { vst1q_u16(to, v); }

// Adds neighbours, kLevels times: the first `count` >> kLevels vectors then hold the sums, in order.
template <int kLevels, typename Vector>
HE_INLINE void fold(Vector* vectors, int count) {
  if constexpr (kLevels > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) vectors[i] = add_pairs(vectors[2 * i], vectors[2 * i + 1]);
    fold<kLevels - 1>(vectors, count / 2);
  }
}

// How often neighbours of a row can be added before a byte overflows, or is a distance.
constexpr int byte_levels(int64_t row) {
  const int64_t most = 8 * std::max<int64_t>(row / kVector, 1);  // that a byte holds before
  int levels = 0;
  while (2 << levels <= row && most << (levels + 1) < 256) ++levels;
  return levels;
}

// kOf queries against as many codes as make kSums vectors. kRow is the bytes of a row where they are known, else 0.
template <int kOf, int kRow>
struct Group {
  static constexpr int kVectors = kSums / kOf;  // of codes
  static constexpr int64_t kCodes = kRow && kRow < kVector ? kVectors * kVector / kRow : kVectors;
  static constexpr bool is_byte = kRow && kRow <= kVector;  // a distance
  using Vector = std::conditional_t<is_byte, Bytes, Shorts>;
  using Distance = std::conditional_t<is_byte, uint8_t, uint16_t>;
  static constexpr int64_t kDistances = kOf * kCodes;  // of the first query to each code, then of the second
  static constexpr int kResults = int(kDistances * int64_t(sizeof(Distance)) / kVector);

  static constexpr int kByteLevels = byte_levels(kRow);

  const uint8_t* queries;  // prepared
  int64_t stride;          // from a vector of codes to the next, and from a query to the next

  Group(const HammingQueries& queries, int64_t first_query, int64_t code_bytes)
      : queries(queries.prepared + first_query * query_bytes(code_bytes)),
        stride(kRow ? std::max<int64_t>(kRow, kVector) : row_bytes(code_bytes)) {}

  // The differing bits of each byte, over bytes [begin, end) of the rows.
  HE_INLINE void count_block(const uint8_t* rows, int64_t begin, int64_t end, Bytes (&sums)[kSums]) const {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sums[i] = vdupq_n_u8(0);
    for (int64_t at = begin; at < end; at += kVector) {
      Bytes codes[kVectors];
#pragma GCC unroll 16
      for (int c = 0; c < kVectors; ++c) codes[c] = load(rows + c * stride + at);
#pragma GCC unroll 4
      for (int q = 0; q < kOf; ++q) {
        const Bytes query = load(queries + q * stride + at);
#pragma GCC unroll 16
        for (int c = 0; c < kVectors; ++c) {
          Bytes& sum = sums[q * kVectors + c];
          sum = vaddq_u8(sum, vcntq_u8(veorq_u8(codes[c], query)));
        }
      }
    }
  }

  HE_INLINE void measure(const uint8_t* rows, Vector (&distances)[kResults]) const {
    Bytes sums[kSums];
    count_block(rows, 0, kRow ? stride : std::min(kBlock, stride), sums);
    fold<kByteLevels>(sums, kSums);
    if constexpr (is_byte) {
      std::copy(sums, sums + kResults, distances);
    } else {
      constexpr int kLeft = kSums >> kByteLevels;
      Shorts wide[kLeft];
#pragma GCC unroll 16
      for (int i = 0; i < kLeft; ++i) wide[i] = vpaddlq_u8(sums[i]);
      for (int64_t begin = kBlock; begin < stride && !kRow; begin += kBlock) {
        count_block(rows, begin, std::min(begin + kBlock, stride), sums);
#pragma GCC unroll 16
        for (int i = 0; i < kLeft; ++i) wide[i] = vpadalq_u8(wide[i], sums[i]);
      }
      fold<3 - kByteLevels>(wide, kLeft);
      std::copy(wide, wide + kResults, distances);
    }
  }

  static HE_INLINE void load_bounds(const Selector* selectors, Vector (&bounds)[kResults]) {
    Distance each[kDistances];
    for (int64_t i = 0; i < kDistances; ++i) each[i] = Distance(selectors[i / kCodes].bound());
    for (int i = 0; i < kResults; ++i) bounds[i] = load(each + i * kDistances / kResults);
  }

  static HE_INLINE void store_distances(const Vector (&distances)[kResults], Distance* to) {
    for (int i = 0; i < kResults; ++i) store(to + i * kDistances / kResults, distances[i]);
  }

  // The rare path, out of line so that the loop keeps its registers.
  static __attribute__((noinline)) void offer(const Distance* distances, const HammingTile& tile, int64_t first_code,
                                              Selector* selectors) {
    for (int64_t i = 0; i < kDistances; ++i)
      selectors[i / kCodes].offer(distances[i], tile.position_of(first_code + i % kCodes));
  }
};

// The whole tile against kOf queries from `first_query` on.
template <int kOf, int kRow>
void scan_queries(const HammingTile& tile, const HammingQueries& queries, int64_t first_query, Selector* selectors) {
  using Group = Group<kOf, kRow>;
  const Group group(queries, first_query, tile.code_bytes);
  const uint8_t* rows = rows_of(tile);
  typename Group::Vector bounds[Group::kResults], distances[Group::kResults];
  Group::load_bounds(selectors, bounds);
  int64_t code = 0;
  for (; code + Group::kCodes <= tile.count; code += Group::kCodes, rows += Group::kVectors * group.stride) {
    group.measure(rows, distances);
    Bytes any = is_below(distances[0], bounds[0]);
#pragma GCC unroll 16
    for (int i = 1; i < Group::kResults; ++i) any = vorrq_u8(any, is_below(distances[i], bounds[i]));
    if (__builtin_expect(vmaxvq_u32(vreinterpretq_u32_u8(any)) == 0, 1)) continue;
    typename Group::Distance each[Group::kDistances];
    Group::store_distances(distances, each);
    Group::offer(each, tile, code, selectors);
    Group::load_bounds(selectors, bounds);
  }
  for (; code < tile.count; ++code)
    for (int q = 0; q < kOf; ++q)
      selectors[q].offer(hamming_distance(tile, code, queries, first_query + q), tile.position_of(code));
}

// Calls body with the bytes of a row as a constant, 0 for lengths that have no loops of their own.
template <typename Body>
void with_row(int64_t code_bytes, Body body) {
  switch (row_bytes(code_bytes)) {
    case 4: return body(std::integral_constant<int, 4>());
    case 8: return body(std::integral_constant<int, 8>());
    case 16: return body(std::integral_constant<int, 16>());
    case 32: return body(std::integral_constant<int, 32>());
    case 48: return body(std::integral_constant<int, 48>());
    case 64: return body(std::integral_constant<int, 64>());
    case 96: return body(std::integral_constant<int, 96>());
    case 128: return body(std::integral_constant<int, 128>());
    default: return body(std::integral_constant<int, 0>());
  }
}

void scan(const HammingTile& tile, const HammingQueries& queries, Selector* selectors) {
  with_row(tile.code_bytes, [&](auto row) {
    int64_t q = 0;
    for (; q + kQueries <= queries.count; q += kQueries) scan_queries<kQueries, row>(tile, queries, q, selectors + q);
    for (; q < queries.count; ++q) scan_queries<1, row>(tile, queries, q, selectors + q);
  });
}

void measure(const HammingTile& tile, const HammingQueries& queries, int64_t query, uint32_t* distances) {
  with_row(tile.code_bytes, [&](auto row) {
    using Group = Group<1, row>;
    const Group group(queries, query, tile.code_bytes);
    const uint8_t* rows = rows_of(tile);
    int64_t code = 0;
    for (; code + Group::kCodes <= tile.count; code += Group::kCodes, rows += Group::kVectors * group.stride) {
      typename Group::Vector found[Group::kResults];
      group.measure(rows, found);
      typename Group::Distance each[Group::kDistances];
      Group::store_distances(found, each);
      std::copy(each, each + Group::kDistances, distances + code);
    }
    for (; code < tile.count; ++code) distances[code] = hamming_distance(tile, code, queries, query);
  });
}

}  // namespace

const HammingKernel kHammingNeon = {tile_codes, tile_bytes, query_bytes, prepare_tile, prepare_queries,
                                    scan,       measure,    8191,  // whose bits 16 bits can count
                                    0,          0};

}  // namespace hashengine

#endif
