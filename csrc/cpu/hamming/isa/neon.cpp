// Hamming search with NEON, which counts the bits of every byte: xor, cnt and add, 3 instructions per 16 bytes.
//
// Idea. The bit counts of a code's bytes must be summed across a vector. One addp instruction adds the neighbours in
// two vectors, and 15 addp instructions turn 16 vectors of counts into one vector of 16 sums. A layout with the same
// byte of 16 codes in each vector would need as many additions. Therefore codes are read one by one, in their stored
// form (some lengths are padded). A query's bytes then need not be broadcast, and a single query needs no kernel of its
// own. Four queries share each load of four vectors of codes, and the 16 vectors of counts stay in registers.
//
// Widths. The distance of codes of up to 128 bits fits in a byte, so that one comparison tests 16 distances. For longer
// codes, neighbours are summed in bytes as long as the sums fit, then in 16 bits. A byte can hold the sum of the counts
// of 31 vectors. Codes of more than 31 vectors are summed in blocks of 31 vectors. Counting a block takes 93
// instructions, and adding it to the 16-bit sums takes 1 more. (Dividing the bound between blocks, as isa/avx2.cpp
// does, would take 3 instructions per block and an exact check of each hit.)
//
// Cost in instructions per 16 distances, with loads, test and loop, as compiled by GCC 12: 16 at 32 bits, 31 at 64, 60
// at 128, 124 at 256, 183 at 384, 285 at 512, 422 at 768, 551 at 1024; other lengths take about 80 plus 59 per 128
// bits.

#include "cpu/hamming/kernel.h"

#ifdef HE_ARM

#include <arm_neon.h>

#include <type_traits>

namespace hashengine {
namespace {

constexpr int kSums = 16;          // vectors of counts; they fill half of the registers
constexpr int kSharedQueries = 4;  // queries that share each load of codes
constexpr int64_t kVectorBytes = 16;
constexpr int64_t kBlockBytes = 31 * kVectorBytes;  // a byte can sum the counts of 31 vectors: 31 * 8 < 256

using Bytes = uint8x16_t;
using Shorts = uint16x8_t;

// The bytes of a row. A row holds one code in 4 bytes, 8 bytes or whole vectors; shorter codes are padded with zeros.
int64_t row_bytes(int64_t code_bytes) {
  return code_bytes <= 4 ? 4 : code_bytes <= 8 ? 8 : round_up(code_bytes, kVectorBytes);
}

// The number of codes in the largest group (see Group): the group for a single query.
int64_t max_group_codes(int64_t row) { return kSums * std::max<int64_t>(kVectorBytes / row, 1); }

int64_t tile_codes(int64_t code_bytes) {
  const int64_t row = row_bytes(code_bytes), group = max_group_codes(row);
  return std::max(kTileBytes / row / group * group, group);
}
int64_t tile_bytes(int64_t codes, int64_t code_bytes) {
  const int64_t row = row_bytes(code_bytes);
  return row == code_bytes ? 0 : codes * row;
}
int64_t query_bytes(int64_t code_bytes) { return std::max(row_bytes(code_bytes), kVectorBytes); }

void pad(const uint8_t* code, int64_t code_bytes, int64_t row, uint8_t* to) {
  std::memcpy(to, code, size_t(code_bytes));
  std::memset(to + code_bytes, 0, size_t(row - code_bytes));
}

void prepare_tile(const uint8_t* codes, int64_t count, int64_t code_bytes, uint8_t* tile) {
  const int64_t row = row_bytes(code_bytes);
  if (row == code_bytes) return;
  for (int64_t i = 0; i < count; ++i) pad(codes + i * code_bytes, code_bytes, row, tile + i * row);
}

// Repeats a short query to fill a vector, because a vector holds several short codes.
void prepare_queries(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared) {
  const int64_t row = row_bytes(code_bytes), repeats = std::max(kVectorBytes / row, int64_t(1));
  for (int64_t i = 0; i < count * repeats; ++i)
    pad(queries + i / repeats * code_bytes, code_bytes, row, prepared + i * row);
}

const uint8_t* rows_of(const HammingTile& tile) {
  return row_bytes(tile.code_bytes) == tile.code_bytes ? tile.codes : tile.prepared;
}

HE_INLINE Bytes add_pairs(Bytes a, Bytes b) { return vpaddq_u8(a, b); }
HE_INLINE Shorts add_pairs(Shorts a, Shorts b) { return vpaddq_u16(a, b); }
HE_INLINE Bytes is_below(Bytes a, Bytes b) { return vcltq_u8(a, b); }
HE_INLINE Bytes is_below(Shorts a, Shorts b) { return vreinterpretq_u8_u16(vcltq_u16(a, b)); }
HE_INLINE Bytes load(const uint8_t* from) { return vld1q_u8(from); }
HE_INLINE Shorts load(const uint16_t* from) { return vld1q_u16(from); }
HE_INLINE void store(uint8_t* to, Bytes v) { vst1q_u8(to, v); }
HE_INLINE void store(uint16_t* to, Shorts v) { vst1q_u16(to, v); }

// Adds neighbours, kLevels times. The first count >> kLevels vectors then hold the sums, in order.
template <int kLevels, typename Vector>
HE_INLINE void fold(Vector* vectors, int count) {
  if constexpr (kLevels > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) vectors[i] = add_pairs(vectors[2 * i], vectors[2 * i + 1]);
    fold<kLevels - 1>(vectors, count / 2);
  }
}

// How many times neighbouring sums of a row can be added in bytes: until each sum is a distance, or until the next
// addition could overflow.
constexpr int byte_levels(int64_t row) {
  const int64_t most = 8 * std::max<int64_t>(row / kVectorBytes, 1);  // the largest count before the first addition
  int levels = 0;
  while (2 << levels <= row && most << (levels + 1) < 256) ++levels;
  return levels;
}

// Computes the distances of a group: kQueries queries, and as many codes as give kSums vectors of counts. kRow: the
// bytes of a row as a constant; 0: any number.
template <int kQueries, int kRow>
struct Group {
  static constexpr int kVectors = kSums / kQueries;  // vectors of codes per step
  static constexpr int64_t kCodes = kRow && kRow < kVectorBytes ? kVectors * kVectorBytes / kRow : kVectors;
  static constexpr bool is_byte = kRow && kRow <= kVectorBytes;  // whether a distance fits in a byte
  using Vector = std::conditional_t<is_byte, Bytes, Shorts>;
  using Distance = std::conditional_t<is_byte, uint8_t, uint16_t>;
  static constexpr int64_t kDistances = kQueries * kCodes;                                     // [query, code]
  static constexpr int kResults = int(kDistances * int64_t(sizeof(Distance)) / kVectorBytes);  // vectors of distances

  static constexpr int kByteLevels = byte_levels(kRow);

  const uint8_t* prepared_queries;
  int64_t stride;  // bytes from one code (or vector of short codes) to the next, and from one query to the next

  Group(const QueryBlock& queries, int64_t first_query, int64_t code_bytes)
      : prepared_queries(queries.prepared + first_query * query_bytes(code_bytes)),
        stride(kRow ? std::max<int64_t>(kRow, kVectorBytes) : row_bytes(code_bytes)) {}

  // Counts the differing bits in each byte of a vector. Sums the counts over the vectors in bytes [begin, end) of a
  // row.
  HE_INLINE void count_block(const uint8_t* rows, int64_t begin, int64_t end, Bytes (&sums)[kSums]) const {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sums[i] = vdupq_n_u8(0);
    for (int64_t at = begin; at < end; at += kVectorBytes) {
      Bytes codes[kVectors];
#pragma GCC unroll 16
      for (int c = 0; c < kVectors; ++c) codes[c] = load(rows + c * stride + at);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) {
        const Bytes query = load(prepared_queries + q * stride + at);
#pragma GCC unroll 16
        for (int c = 0; c < kVectors; ++c) {
          Bytes& sum = sums[q * kVectors + c];
          sum = vaddq_u8(sum, vcntq_u8(veorq_u8(codes[c], query)));
        }
      }
    }
  }

  HE_INLINE void compute(const uint8_t* rows, Vector (&distances)[kResults]) const {
    Bytes sums[kSums];
    count_block(rows, 0, kRow ? stride : std::min(kBlockBytes, stride), sums);
    fold<kByteLevels>(sums, kSums);
    if constexpr (is_byte) {
      std::copy(sums, sums + kResults, distances);
    } else {
      constexpr int kWide = kSums >> kByteLevels;
      Shorts wide[kWide];
#pragma GCC unroll 16
      for (int i = 0; i < kWide; ++i) wide[i] = vpaddlq_u8(sums[i]);
      for (int64_t begin = kBlockBytes; begin < stride && !kRow; begin += kBlockBytes) {
        count_block(rows, begin, std::min(begin + kBlockBytes, stride), sums);
#pragma GCC unroll 16
        for (int i = 0; i < kWide; ++i) wide[i] = vpadalq_u8(wide[i], sums[i]);
      }
      fold<3 - kByteLevels>(wide, kWide);
      std::copy(wide, wide + kResults, distances);
    }
  }

  static HE_INLINE void load_bounds(const Selector* selectors, Vector (&bounds)[kResults]) {
    Distance values[kDistances];
    for (int64_t i = 0; i < kDistances; ++i) values[i] = Distance(selectors[i / kCodes].bound());
    for (int i = 0; i < kResults; ++i) bounds[i] = load(values + i * kDistances / kResults);
  }

  static HE_INLINE void store_distances(const Vector (&distances)[kResults], Distance* to) {
    for (int i = 0; i < kResults; ++i) store(to + i * kDistances / kResults, distances[i]);
  }

  // Pushes all codes of the group. This path is rare. It is not inlined, so that it takes no registers from the loop.
  static __attribute__((noinline)) void push(const Distance* distances, const HammingTile& tile, int64_t first_code,
                                             Selector* selectors) {
    for (int64_t i = 0; i < kDistances; ++i)
      selectors[i / kCodes].push(distances[i], tile.position_of(first_code + i % kCodes));
  }
};

// Scans the whole tile for kQueries queries, starting with `first_query`.
template <int kQueries, int kRow>
void scan_queries(const HammingTile& tile, const QueryBlock& queries, int64_t first_query, Selector* selectors) {
  using Group = Group<kQueries, kRow>;
  const Group group(queries, first_query, tile.code_bytes);
  const uint8_t* rows = rows_of(tile);
  typename Group::Vector bounds[Group::kResults], distances[Group::kResults];
  Group::load_bounds(selectors, bounds);
  int64_t code = 0;
  for (; code + Group::kCodes <= tile.count; code += Group::kCodes, rows += Group::kVectors * group.stride) {
    group.compute(rows, distances);
    Bytes any = is_below(distances[0], bounds[0]);
#pragma GCC unroll 16
    for (int i = 1; i < Group::kResults; ++i) any = vorrq_u8(any, is_below(distances[i], bounds[i]));
    if (__builtin_expect(vmaxvq_u32(vreinterpretq_u32_u8(any)) == 0, 1)) continue;
    typename Group::Distance values[Group::kDistances];
    Group::store_distances(distances, values);
    Group::push(values, tile, code, selectors);
    Group::load_bounds(selectors, bounds);
  }
  for (; code < tile.count; ++code)
    for (int q = 0; q < kQueries; ++q)
      selectors[q].push(hamming_distance(tile, code, queries, first_query + q), tile.position_of(code));
}

// Calls body with the bytes of a row as a constant, or with 0 if the length has no specialised loop.
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

void scan(const HammingTile& tile, const QueryBlock& queries, Selector* selectors) {
  with_row(tile.code_bytes, [&](auto row) {
    int64_t q = 0;
    for (; q + kSharedQueries <= queries.count; q += kSharedQueries)
      scan_queries<kSharedQueries, row>(tile, queries, q, selectors + q);
    for (; q < queries.count; ++q) scan_queries<1, row>(tile, queries, q, selectors + q);
  });
}

void compute_distances(const HammingTile& tile, const QueryBlock& queries, int64_t query, uint32_t* distances) {
  with_row(tile.code_bytes, [&](auto row) {
    using Group = Group<1, row>;
    const Group group(queries, query, tile.code_bytes);
    const uint8_t* rows = rows_of(tile);
    int64_t code = 0;
    for (; code + Group::kCodes <= tile.count; code += Group::kCodes, rows += Group::kVectors * group.stride) {
      typename Group::Vector vectors[Group::kResults];
      group.compute(rows, vectors);
      typename Group::Distance values[Group::kDistances];
      Group::store_distances(vectors, values);
      std::copy(values, values + Group::kDistances, distances + code);
    }
    for (; code < tile.count; ++code) distances[code] = hamming_distance(tile, code, queries, query);
  });
}

}  // namespace

const HammingKernel kHammingNeon = {
    tile_codes, tile_bytes, query_bytes, prepare_tile, prepare_queries, scan, compute_distances, nullptr, nullptr,
    8191,  // the distances of longer codes do not fit in 16 bits
    0,          0};

}  // namespace hashengine

#endif
