// Hamming search for many queries, bit-sliced: bit q of every vector belongs to query q of a block of 128 to 512
// queries.
//
// Idea. A code is read in fields of three, six or seven bits. Each field has a table, which is prepared once per block:
// for each value of the field it holds the distance between this value and the same field of each query. The distances
// are stored in slices: slice w is a vector that holds bit w of every query's distance. Distances of 0 to 7 take
// three slices, distances of 0 to 3 take two. Full adders sum the slices of a code's fields. The sum of each query has
// n slices and starts at 2^n minus the query's bound, so that the carry out of the last slice marks the queries whose
// distance is not below their bound. No population count is needed.
//
// Cost. A field of seven bits takes three loads and about three full adders. A full adder takes 5 instructions with
// AVX2, 2 with AVX-512, and 3 with NEON. A code of 64 bits takes 28 loads and 27 full adders: with AVX2, 28 + 27 * 5 =
// 163 instructions for 256 distances. Codes need no prepared layout.
//
// Limits. The speed is limited by the arithmetic and by transfers from the second-level to the first-level cache, which
// are assumed to take two cycles per cache line. With AVX2, a table entry of three slices spans two cache lines, and an
// entry of two slices fits in one; the table of a 7-bit field has 12 KB, and the tables of a word have 108 KB. Codes of
// more than two words have narrower fields, so that all their tables, 53 to 340 KB, stay in the second-level cache.
#pragma once

#include "cpu/hamming/kernel.h"

// Before including this file, define HE_BITSLICED_TARGET as the level's target attribute: intrinsics are inlined only
// into functions that have it.
#define HE_BITSLICED HE_BITSLICED_TARGET HE_INLINE

namespace hashengine {

constexpr int64_t kMaxBitslicedWords = 32;  // 64-bit words; the tables of longer codes do not fit in the cache
constexpr int kMaxWeights = 12;             // for distances of up to 2048
constexpr int64_t kMaxHitCodes = 512;       // codes that are collected before they are pushed; a multiple of 64
static_assert(kMaxHitCodes <= Selector::kMaxPush, "all collected codes may be hits of one query");
constexpr int64_t kMaxStepCodes = 128;   // codes that are scanned between two checks of the number of collected codes
constexpr int64_t kMinPairsPerCode = 4;  // pairs of a collected code and a query; fewer are pushed one by one

// How a 64-bit word of a code is divided into fields of kBits bits. The last, shorter field takes the remaining bits.
template <int kBits>
struct WordFields {
  static constexpr int kFields = 64 / kBits;
  static constexpr int kValues = 1 << kBits;
  static constexpr int kLastBits = 64 % kBits;
  static constexpr int kSlices = kBits > 3 ? 3 : 2;  // for a distance of 0 to kBits
  static constexpr int64_t kEntries = kFields * kValues + (kLastBits ? 1 << kLastBits : 0);
  static constexpr int64_t kVectors = kEntries * kSlices;
};

// A counter per query, in kWeights slices: slice w has weight 2^w. A full adder adds two addends of equal
// weight to a slice, so an addend is kept pending until a second addend of its weight arrives.
template <typename Level, int kWeights>
struct BitslicedCounter {
  using Vector = typename Level::Vector;

  HE_BITSLICED explicit BitslicedCounter(const Vector* start) {
#pragma GCC unroll 12
    for (int w = 0; w < kWeights; ++w) sum[w] = start[w];
  }

  // Starts a series of additions, which finish() ends. If the additions are unrolled, the compiler knows which addends
  // are pending.
  HE_BITSLICED void begin() {
#pragma GCC unroll 12
    for (int w = 0; w < kWeights; ++w) is_pending[w] = false;
  }

  template <int kWeight>
  HE_BITSLICED void add(Vector slice) {
    if constexpr (kWeight == kWeights) {
      overflow = overflow | slice;
    } else if (!is_pending[kWeight]) {
      pending[kWeight] = slice;
      is_pending[kWeight] = true;
    } else {
      is_pending[kWeight] = false;
      add<kWeight + 1>(Level::full_add(sum[kWeight], pending[kWeight], slice));
    }
  }

  // Adds the addends that are still pending.
  template <int kWeight = 0>
  HE_BITSLICED void finish() {
    if constexpr (kWeight < kWeights) {
      if (is_pending[kWeight]) {
        const Vector carry = sum[kWeight] & pending[kWeight];
        sum[kWeight] = sum[kWeight] ^ pending[kWeight];
        add<kWeight + 1>(carry);
      }
      finish<kWeight + 1>();
    }
  }

  Vector sum[kWeights];
  Vector pending[kWeights] = {};
  bool is_pending[kWeights];
  Vector overflow{};
};

// Scans one tile for one block of queries. Level provides Vector; full_add(sum, b, c), which updates the sum and
// returns the carry; has_zero(v), which returns whether any bit is zero; and words_with_zero(v), which returns a bitmap
// of the 64-bit words of which any bit is zero.
template <typename Level>
class BitslicedScan {
 public:
  using Vector = typename Level::Vector;
  static constexpr int64_t kQueries = 8 * sizeof(Vector);

  // Tiles are large, because the bounds are converted to slices again for each tile.
  static int64_t tile_codes(int64_t code_bytes) { return std::max<int64_t>((128 << 10) / code_bytes, 1024); }
  // The size of a block's tables divided by the number of its queries, rounded up.
  static int64_t query_bytes(int64_t code_bytes) {
    const int64_t words = words_of(code_bytes), bits = field_bits(words);
    const int64_t vectors = bits == 7   ? WordFields<7>::kVectors
                            : bits == 6 ? WordFields<6>::kVectors
                                        : WordFields<3>::kVectors;
    return (words * vectors * int64_t(sizeof(Vector)) + kQueries - 1) / kQueries;
  }

  static HE_BITSLICED void prepare_queries(const uint8_t* queries, int64_t count, int64_t code_bytes,
                                           uint8_t* prepared) {
    auto* table = reinterpret_cast<Vector*>(prepared);
    for (int64_t byte = 0; byte < code_bytes; byte += 8) {
      Vector slices[64];  // slices[b]: bit b of the word, of all queries
      for (int64_t first = 0; first < kQueries; first += 64) {
        uint64_t rows[64] = {};
        for (int64_t q = first; q < std::min(first + 64, count); ++q)
          rows[q - first] = load_code_word(queries + q * code_bytes + byte, std::min<int64_t>(8, code_bytes - byte));
        transpose_bits(rows);
        for (int64_t bit = 0; bit < 64; ++bit) slices[bit][first / 64] = rows[bit];
      }
      table = fill_tables(slices, int(field_bits(words_of(code_bytes))), table);
    }
  }

  HE_BITSLICED BitslicedScan(const HammingTile& tile, const QueryBlock& queries, Selector* selectors)
      : tile_(tile),
        queries_(queries),
        selectors_(selectors),
        tables_(reinterpret_cast<const Vector*>(queries.prepared)),
        is_sparse_(tile.position_of(0) > 0) {}

  HE_BITSLICED void run() {
    switch (tile_.code_bytes) {
      case 4: return scan<WordFields<7>, 1, 1, 6, 5>();
      case 8: return scan<WordFields<7>, 1, 1, 7>();
      case 16: return scan<WordFields<7>, 1, 2, 8>();
      case 32: return scan<WordFields<6>, 1, 4, 9>();
      case 48: return scan<WordFields<3>, 3, 2, 9>();
      case 64: return scan<WordFields<3>, 2, 4, 10>();
      case 96: return scan<WordFields<3>, 3, 4, 10>();
      case 128: return scan<WordFields<3>, 4, 4, 11>();
    }
    const int64_t bits = field_bits(words_of(tile_.code_bytes));
    if (bits == 7) return scan<WordFields<7>, 0, 1, 8>();
    if (bits == 6) return scan<WordFields<6>, 0, 1, 9>();
    return scan<WordFields<3>, 0, 1, kMaxWeights>();
  }

 private:
  static int64_t words_of(int64_t code_bytes) { return (code_bytes + 7) / 8; }

  static int64_t field_bits(int64_t words) { return words <= 2 ? 7 : words <= 4 ? 6 : 3; }

  // Transposes 64 rows of 64 bits in place. If Row is a vector of 64-bit words, word i of all rows forms
  // matrix i, and each matrix is transposed on its own.
  template <typename Row>
  static HE_BITSLICED void transpose_bits(Row* rows) {
    uint64_t mask = 0x00000000ffffffff;
    for (int width = 32; width; width /= 2, mask ^= mask << width)
      for (int row = 0; row < 64; row = (row + width + 1) & ~width) {
        const Row swapped = (rows[row] >> width ^ rows[row + width]) & mask;
        rows[row] ^= swapped << width;
        rows[row + width] ^= swapped;
      }
  }

  // The position of the lowest set bit; 63 if no bit is set.
  static HE_BITSLICED int lowest_bit(uint64_t bits) { return __builtin_ctzll(bits | uint64_t(1) << 63); }

  // Writes the tables of all fields of a word and returns their end.
  static HE_BITSLICED Vector* fill_tables(const Vector* slices, int field_bits, Vector* table) {
    const int distance_slices = field_bits > 3 ? 3 : 2;
    for (int first = 0; first < 64; first += field_bits) {
      const int bits = std::min(field_bits, 64 - first);
      for (int value = 0; value < 1 << bits; ++value, table += distance_slices) {
        for (int slice = 0; slice < distance_slices; ++slice) table[slice] = Vector{};
        for (int i = 0; i < bits; ++i) {
          Vector carry = value >> i & 1 ? ~slices[first + i] : slices[first + i];
          for (int slice = 0; slice < distance_slices; ++slice) {
            const Vector sum = table[slice];
            table[slice] = sum ^ carry;
            carry = carry & sum;
          }
        }
      }
    }
    return table;
  }

  // A code is summed in kRounds rounds of kWords words each. If kRounds is 0, the number of words is not a constant.
  // kWeights: the number of slices of a counter, enough for every distance. kFields: the number of fields that are read
  // of each word; it is 5 for codes of 4 bytes only.
  template <typename Word, int kRounds, int kWords, int kWeights, int kFields = Word::kFields>
  HE_BITSLICED void scan() {
    constexpr int64_t kBytes = kFields == 5 ? 4 : 8 * kRounds * kWords;
    for (int64_t q = 0; q < kQueries; ++q) set_bound<kWeights>(q, q < queries_.count ? selectors_[q].bound() : 0);
    for (int64_t first = 0; first < tile_.count;) {
      // Bounds fall fast at first, so the first steps are short.
      const int64_t seen = tile_.position_of(first);
      const int64_t count = std::min(std::clamp<int64_t>(seen / 4, 16, kMaxStepCodes), tile_.count - first);
      collect_hits<Word, kRounds, kWords, kWeights, kFields>(first, count);
      first += count;
      if (hit_count_ > kMaxHitCodes - kMaxStepCodes || count < kMaxStepCodes || first == tile_.count)
        push_hits<kWeights, kBytes>();
    }
  }

  // Sets the initial value of the query's counter to 2^kWeights - bound, so that the counter overflows if the distance
  // is not below the bound.
  template <int kWeights>
  HE_BITSLICED void set_bound(int64_t query, uint32_t bound) {
    bounds_[query] = bound;
    const uint32_t start = (1u << kWeights) - bound;
    for (int w = 0; w <= kWeights; ++w) {
      const uint64_t others = starts_[w][query / 64] & ~(uint64_t(1) << query % 64);
      starts_[w][query / 64] = others | uint64_t(start >> w & 1) << query % 64;
    }
  }

  // Appends to hit_codes_ the codes whose distance is below the bound of at least one query. For each of these
  // codes, appends to misses_ a vector in which a query's bit is 1 if the distance is not below the query's bound.
  template <typename Word, int kRounds, int kWords, int kWeights, int kFields>
  HE_BITSLICED void collect_hits(int64_t first, int64_t count) {
    const uint8_t* codes = tile_.codes + first * tile_.code_bytes;
    const int64_t rounds = kRounds ? kRounds : words_of(tile_.code_bytes);
    for (int64_t code = first; code < first + count; ++code, codes += tile_.code_bytes) {
      BitslicedCounter<Level, kWeights> counter(starts_);
      const Vector* table = tables_;
      for (int64_t round = 0; round < rounds; ++round) {
        counter.begin();
#pragma GCC unroll 4
        for (int w = 0; w < kWords; ++w) {
          const int64_t byte = 8 * (kWords * round + w);
          const int64_t width = kFields == 5 ? 4 : kRounds ? 8 : std::min<int64_t>(8, tile_.code_bytes - byte);
          const uint64_t word = load_code_word(codes + byte, width);
          table = add_word<Word, kFields>(table, word, counter);
        }
        counter.finish();
      }
      misses_[hit_count_] = starts_[kWeights] | counter.overflow;
      hit_codes_[hit_count_] = uint32_t(code);
      hit_count_ += Level::has_zero(misses_[hit_count_]);
    }
  }

  // Adds the distances of a word's fields. Returns the tables of the next word.
  template <typename Word, int kFields, typename Counter>
  static HE_BITSLICED const Vector* add_word(const Vector* table, uint64_t word, Counter& counter) {
    constexpr int kBits = 64 / Word::kFields;
#pragma GCC unroll 21
    for (int f = 0; f < kFields; ++f, table += Word::kValues * Word::kSlices)
      add_entry<Word::kSlices>(find_entry<Word>(table, word, f * kBits), counter);
    if (kFields < Word::kFields || !Word::kLastBits) return table;
    add_entry<Word::kLastBits == 1 ? 1 : Word::kSlices>(find_entry<Word>(table, word, 64 - Word::kLastBits), counter);
    return table + (Word::kSlices << Word::kLastBits);
  }

  template <int kSlices, typename Counter>
  static HE_BITSLICED void add_entry(const Vector* entry, Counter& counter) {
    counter.template add<0>(entry[0]);
    if (kSlices == 1) return;
    counter.template add<1>(entry[1]);
    if (kSlices == 2) return;
    counter.template add<2>(entry[2]);
  }

  // The table entry of the field that begins at bit `first_bit`. Computing its offset in bytes takes three
  // instructions.
  template <typename Word>
  static HE_BITSLICED const Vector* find_entry(const Vector* table, uint64_t word, int first_bit) {
    constexpr int kScale = __builtin_ctz(sizeof(Vector));
    const uint64_t scaled = first_bit < kScale ? word << (kScale - first_bit) : word >> (first_bit - kScale);
    const uint64_t offset = Word::kSlices * (scaled & (uint64_t(Word::kValues - 1) << kScale));
    return reinterpret_cast<const Vector*>(reinterpret_cast<const uint8_t*>(table) + offset);
  }

  // Pushes the collected codes to the selectors.
  template <int kWeights, int64_t kBytes>
  HE_BITSLICED void push_hits() {
    const int64_t pairs = is_sparse_ ? push_by_code<kWeights, kBytes>() : push_by_query<kWeights, kBytes>();
    is_sparse_ = pairs < kMinPairsPerCode * hit_count_;
    hit_count_ = 0;
  }

  // For few pairs of a code and a query: takes the queries of a code one after another. Returns the number of pairs.
  template <int kWeights, int64_t kBytes>
  HE_BITSLICED int64_t push_by_code() {
    const int64_t bytes = kBytes ? kBytes : tile_.code_bytes;
    int64_t pairs = 0;
    for (int64_t row = 0; row < hit_count_; ++row) {
      const uint8_t* const code = tile_.codes + hit_codes_[row] * bytes;
      const uint32_t position = tile_.position_of(hit_codes_[row]);
      for (uint32_t words = Level::words_with_zero(misses_[row]); words; words &= words - 1) {
        const int64_t word = __builtin_ctz(words);
        for (uint64_t hits = ~misses_[row][word]; hits; hits &= hits - 1, ++pairs) {
          const int64_t query = 64 * word + __builtin_ctzll(hits);
          Selector& selector = selectors_[query];
          selector.push(hamming_distance(queries_.codes + query * bytes, code, bytes), position);
          if (selector.bound() != bounds_[query]) set_bound<kWeights>(query, selector.bound());
        }
      }
    }
    return pairs;
  }

  // For many pairs: takes the codes of a query one after another. misses_ has a row per code and a column per query.
  // Transposing groups of 64 rows turns each column into 64-bit words. Returns the number of pairs.
  template <int kWeights, int64_t kBytes>
  HE_BITSLICED int64_t push_by_query() {
    int64_t pairs = 0;
    const int64_t groups = (hit_count_ + 63) / 64;
    std::fill(misses_ + hit_count_, misses_ + 64 * groups, ~Vector{});
    for (int64_t group = 0; group < groups; ++group) transpose_bits(misses_ + 64 * group);
    for (int64_t row = 0; row < 64; ++row) {
      Vector missed = ~Vector{};
      for (int64_t group = 0; group < groups; ++group) missed &= misses_[64 * group + row];
      if (!Level::has_zero(missed)) continue;
      for (int64_t word = 0; word < kQueries / 64; ++word)
        if (~missed[word]) pairs += push_to<kWeights, kBytes>(64 * word + row, groups);
    }
    return pairs;
  }

  // Returns the number of the query's hits. kBytes: the length of a code as a constant; 0: any length.
  template <int kWeights, int64_t kBytes>
  HE_BITSLICED int64_t push_to(int64_t query, int64_t groups) {
    const int64_t bytes = kBytes ? kBytes : tile_.code_bytes;
    const uint8_t* const query_code = queries_.codes + query * bytes;
    uint32_t hits[kMaxHitCodes + 1], distances[kMaxHitCodes], positions[kMaxHitCodes];
    int64_t count = 0;
    for (int64_t group = 0; group < groups; ++group) {
      // Most words have at most two hits. Two hits are taken without a loop, because the end of a loop would be
      // mispredicted.
      uint64_t remaining = ~misses_[64 * group + query % 64][query / 64];
      const uint32_t* const codes = hit_codes_ + 64 * group;
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i, remaining &= remaining - 1) {
        hits[count] = codes[lowest_bit(remaining)];
        count += remaining != 0;
      }
      for (; remaining; remaining &= remaining - 1) hits[count++] = codes[lowest_bit(remaining)];
    }
    for (int64_t i = 0; i < count; ++i) {
      distances[i] = hamming_distance(query_code, tile_.codes + hits[i] * bytes, bytes);
      positions[i] = tile_.position_of(hits[i]);
    }
    Selector& selector = selectors_[query];
    selector.push_all(distances, positions, count);
    if (selector.bound() != bounds_[query]) set_bound<kWeights>(query, selector.bound());
    return count;
  }

  const HammingTile& tile_;
  const QueryBlock& queries_;
  Selector* const selectors_;
  const Vector* const tables_;
  uint32_t bounds_[kQueries];
  Vector starts_[kMaxWeights + 1];  // [slice]: the counters' initial values; the last slice is the overflow
  Vector misses_[kMaxHitCodes];
  uint32_t hit_codes_[kMaxHitCodes] = {};
  int64_t hit_count_ = 0;
  bool is_sparse_;  // whether few hits per collected code are expected: as in the last push, or after the first tile
};

}  // namespace hashengine
