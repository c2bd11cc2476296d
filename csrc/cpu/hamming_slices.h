// Hamming search for many queries, bit-sliced: vectors whose bit q belongs to query q, a block of 128 to 512 queries.
//
// A code is taken a field of three, six or seven bits at a time. A table, laid out once a block, holds for each value
// of a field its distances from all queries, 0 to 7 in three slices (0 to 3 in two). Full adders sum the slices of a
// code's fields; they start from what each query's bound leaves to a power of two, so that the last carry tells who is
// too far. A field of seven takes three loads and about three adders, of 5 instructions with AVX2, 2 with AVX-512, 3
// with NEON: at 64 bits 28 loads and 27 adders, 163 instructions of AVX2, for 256 distances. Codes are read as they
// lie.
//
// The limit beside arithmetic is what the first-level cache takes from the second: a cache line every other cycle, and
// an entry is two lines (one, of two slices). Fields of seven bits need 12 KB of tables each with AVX2, 108 KB a word;
// longer codes have narrower fields, so that all their tables, of 65 to 344 KB, stay in the second level.
#pragma once

#include "hamming_kernel.h"

// Who includes this defines HE_SLICES_TARGET first, the level's target attribute: intrinsics are inlined only into
// functions that have it.
#define HE_SLICES HE_SLICES_TARGET HE_INLINE

namespace hashengine {

constexpr int64_t kMaxSlicedWords = 32;  // of 64 bits; of longer codes the tables do not fit
constexpr int kMaxWeights = 12;          // of counters up to 2048
constexpr int64_t kMaxNear = 512;        // codes that somebody is near to, until they are offered; a multiple of 64
static_assert(kMaxNear <= Selector::kMostTogether, "a query may be near to all of them");
constexpr int64_t kMaxStep = 128;  // codes between two looks at their number

// A word of a code in fields of kBits, and what is left of it.
template <int kBits>
struct SlicedWord {
  static constexpr int kFields = 64 / kBits;
  static constexpr int kValues = 1 << kBits;
  static constexpr int kRestBits = 64 % kBits;
  static constexpr int kSlices = kBits > 3 ? 3 : 2;  // of a distance of 0 to kBits
  static constexpr int64_t kEntries = kFields * kValues + (kRestBits ? 1 << kRestBits : 0);
  static constexpr int64_t kVectors = kEntries * kSlices;
};

// Sums of slices, kWeights of them kept. A slice waits until a second one of its weight has come.
template <typename Level, int kWeights>
struct SlicedCounter {
  using Vector = typename Level::Vector;

  HE_SLICES explicit SlicedCounter(const Vector* start) {
#pragma GCC unroll 12
    for (int w = 0; w < kWeights; ++w) sum[w] = start[w];
  }

  // Before slices, which settle ends. What waits is known when this is compiled, if no loop lies in between.
  HE_SLICES void begin() {
#pragma GCC unroll 12
    for (int w = 0; w < kWeights; ++w) waits[w] = false;
  }

  template <int kWeight>
  HE_SLICES void add(Vector slice) {
    if constexpr (kWeight == kWeights) {
      overflow = overflow | slice;
    } else if (!waits[kWeight]) {
      waiting[kWeight] = slice;
      waits[kWeight] = true;
    } else {
      waits[kWeight] = false;
      add<kWeight + 1>(Level::full_add(sum[kWeight], waiting[kWeight], slice));
    }
  }

  // After the last slice: what still waits.
  template <int kWeight = 0>
  HE_SLICES void settle() {
    if constexpr (kWeight < kWeights) {
      if (waits[kWeight]) {
        const Vector carry = sum[kWeight] & waiting[kWeight];
        sum[kWeight] = sum[kWeight] ^ waiting[kWeight];
        add<kWeight + 1>(carry);
      }
      settle<kWeight + 1>();
    }
  }

  Vector sum[kWeights];
  Vector waiting[kWeights] = {};
  bool waits[kWeights];
  Vector overflow{};
};

// One block of queries against one tile. Level: Vector; full_add(sum, b, c), which returns the carry; has_zero(v), a
// bit.
template <typename Level>
class SlicedScan {
 public:
  using Vector = typename Level::Vector;
  static constexpr int64_t kQueries = 8 * sizeof(Vector);

  // Bounds are sliced anew for each tile.
  static int64_t tile_codes(int64_t code_bytes) { return std::max<int64_t>((128 << 10) / code_bytes, 1024); }
  static int64_t query_bytes(int64_t code_bytes) {
    const int64_t words = words_of(code_bytes), bits = field_bits(words);
    const int64_t vectors = bits == 7   ? SlicedWord<7>::kVectors
                            : bits == 6 ? SlicedWord<6>::kVectors
                                        : SlicedWord<3>::kVectors;
    return (words * vectors * int64_t(sizeof(Vector)) + kQueries - 1) / kQueries;
  }

  static HE_SLICES void prepare_queries(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared) {
    auto* table = reinterpret_cast<Vector*>(prepared);
    for (int64_t byte = 0; byte < code_bytes; byte += 8) {
      Vector slices[64];  // a bit of the word, of all queries
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

  HE_SLICES SlicedScan(const HammingTile& tile, const HammingQueries& queries, Selector* selectors)
      : tile_(tile),
        queries_(queries),
        selectors_(selectors),
        tables_(reinterpret_cast<const Vector*>(queries.prepared)) {}

  HE_SLICES void run() {
    switch (tile_.code_bytes) {
      case 4: return scan<SlicedWord<7>, 1, 1, 6, 5>();
      case 8: return scan<SlicedWord<7>, 1, 1, 7>();
      case 16: return scan<SlicedWord<7>, 1, 2, 8>();
      case 32: return scan<SlicedWord<6>, 1, 4, 9>();
      case 48: return scan<SlicedWord<3>, 3, 2, 9>();
      case 64: return scan<SlicedWord<3>, 2, 4, 10>();
      case 96: return scan<SlicedWord<3>, 3, 4, 10>();
      case 128: return scan<SlicedWord<3>, 4, 4, 11>();
    }
    const int64_t bits = field_bits(words_of(tile_.code_bytes));
    if (bits == 7) return scan<SlicedWord<7>, 0, 1, 8>();
    if (bits == 6) return scan<SlicedWord<6>, 0, 1, 9>();
    return scan<SlicedWord<3>, 0, 1, kMaxWeights>();
  }

 private:
  static int64_t words_of(int64_t code_bytes) { return (code_bytes + 7) / 8; }

  static int64_t field_bits(int64_t words) { return words <= 2 ? 7 : words <= 4 ? 6 : 3; }

  // 64 rows of 64 bits to columns, in place; of vectors, each word's by itself.
  template <typename Row>
  static HE_SLICES void transpose_bits(Row* rows) {
    uint64_t mask = 0x00000000ffffffff;
    for (int width = 32; width; width /= 2, mask ^= mask << width)
      for (int row = 0; row < 64; row = (row + width + 1) & ~width) {
        const Row swapped = (rows[row] >> width ^ rows[row + width]) & mask;
        rows[row] ^= swapped << width;
        rows[row + width] ^= swapped;
      }
  }

  // 63 of none.
  static HE_SLICES int lowest_bit(uint64_t bits) { return __builtin_ctzll(bits | uint64_t(1) << 63); }

  // Returns the end of the word's tables.
  static HE_SLICES Vector* fill_tables(const Vector* slices, int field_bits, Vector* table) {
    const int kept = field_bits > 3 ? 3 : 2;
    for (int first = 0; first < 64; first += field_bits) {
      const int bits = std::min(field_bits, 64 - first);
      for (int value = 0; value < 1 << bits; ++value, table += kept) {
        for (int slice = 0; slice < kept; ++slice) table[slice] = Vector{};
        for (int i = 0; i < bits; ++i) {
          Vector carry = value >> i & 1 ? ~slices[first + i] : slices[first + i];
          for (int slice = 0; slice < kept; ++slice) {
            const Vector sum = table[slice];
            table[slice] = sum ^ carry;
            carry = carry & sum;
          }
        }
      }
    }
    return table;
  }

  // kChunks times kWords words, or 0 for any number of single ones; kFields of a word's fields; counters of kWeights
  // bits, more than a distance has.
  template <typename Word, int kChunks, int kWords, int kWeights, int kFields = Word::kFields>
  HE_SLICES void scan() {
    constexpr int64_t kBytes = kFields == 5 ? 4 : 8 * kChunks * kWords;
    for (int64_t q = 0; q < kQueries; ++q) set_bound<kWeights>(q, q < queries_.count ? selectors_[q].bound() : 0);
    for (int64_t first = 0; first < tile_.count;) {
      // While few codes were seen, bounds fall fast.
      const int64_t seen = tile_.position_of(first);
      const int64_t count = std::min(std::clamp<int64_t>(seen / 4, 16, kMaxStep), tile_.count - first);
      find_near<Word, kChunks, kWords, kWeights, kFields>(first, count);
      first += count;
      if (near_count_ > kMaxNear - kMaxStep || count < kMaxStep || first == tile_.count) offer_near<kWeights, kBytes>();
    }
  }

  // The query's counter starts so that it reaches 2^kWeights where the distance reaches the bound.
  template <int kWeights>
  HE_SLICES void set_bound(int64_t query, uint32_t bound) {
    bounds_[query] = bound;
    const uint32_t start = (1u << kWeights) - bound;
    for (int w = 0; w <= kWeights; ++w) {
      const uint64_t others = starts_[w][query / 64] & ~(uint64_t(1) << query % 64);
      starts_[w][query / 64] = others | uint64_t(start >> w & 1) << query % 64;
    }
  }

  // Lists the codes that somebody is near to, and for each who is too far.
  template <typename Word, int kChunks, int kWords, int kWeights, int kFields>
  HE_SLICES void find_near(int64_t first, int64_t count) {
    const uint8_t* codes = tile_.codes + first * tile_.code_bytes;
    const int64_t chunks = kChunks ? kChunks : words_of(tile_.code_bytes);
    for (int64_t code = first; code < first + count; ++code, codes += tile_.code_bytes) {
      SlicedCounter<Level, kWeights> counter(starts_);
      const Vector* table = tables_;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        counter.begin();
#pragma GCC unroll 4
        for (int w = 0; w < kWords; ++w) {
          const int64_t byte = 8 * (kWords * chunk + w);
          const int64_t width = kFields == 5 ? 4 : kChunks ? 8 : std::min<int64_t>(8, tile_.code_bytes - byte);
          const uint64_t word = load_code_word(codes + byte, width);
          table = add_word<Word, kFields>(table, word, counter);
        }
        counter.settle();
      }
      far_[near_count_] = starts_[kWeights] | counter.overflow;
      near_codes_[near_count_] = uint32_t(code);
      near_count_ += Level::has_zero(far_[near_count_]);
    }
  }

  // Returns the next word's tables.
  template <typename Word, int kFields, typename Counter>
  static HE_SLICES const Vector* add_word(const Vector* table, uint64_t word, Counter& counter) {
    constexpr int kBits = 64 / Word::kFields;
#pragma GCC unroll 21
    for (int f = 0; f < kFields; ++f, table += Word::kValues * Word::kSlices)
      add_entry<Word::kSlices>(entry_of<Word>(table, word, f * kBits), counter);
    if (kFields < Word::kFields || !Word::kRestBits) return table;
    add_entry<Word::kRestBits == 1 ? 1 : Word::kSlices>(entry_of<Word>(table, word, 64 - Word::kRestBits), counter);
    return table + (Word::kSlices << Word::kRestBits);
  }

  template <int kSlices, typename Counter>
  static HE_SLICES void add_entry(const Vector* entry, Counter& counter) {
    counter.template add<0>(entry[0]);
    if (kSlices == 1) return;
    counter.template add<1>(entry[1]);
    if (kSlices == 2) return;
    counter.template add<2>(entry[2]);
  }

  // The entry of the field that begins with bit `first`; its offset in bytes takes three instructions.
  template <typename Word>
  static HE_SLICES const Vector* entry_of(const Vector* table, uint64_t word, int first) {
    constexpr int kScale = __builtin_ctz(sizeof(Vector));
    const uint64_t scaled = first < kScale ? word << (kScale - first) : word >> (first - kScale);
    const uint64_t offset = Word::kSlices * (scaled & (uint64_t(Word::kValues - 1) << kScale));
    return reinterpret_cast<const Vector*>(reinterpret_cast<const uint8_t*>(table) + offset);
  }

  // Offers the listed codes, to one query after another: there a bit's row is a code and its column a query, which
  // changes places for 64 at a time, so that of each query the hits stand together.
  template <int kWeights, int64_t kBytes>
  HE_SLICES void offer_near() {
    const int64_t groups = (near_count_ + 63) / 64;
    std::fill(far_ + near_count_, far_ + 64 * groups, ~Vector{});
    for (int64_t group = 0; group < groups; ++group) transpose_bits(far_ + 64 * group);
    for (int64_t row = 0; row < 64; ++row) {
      Vector far = ~Vector{};
      for (int64_t group = 0; group < groups; ++group) far &= far_[64 * group + row];
      if (!Level::has_zero(far)) continue;
      for (int64_t word = 0; word < kQueries / 64; ++word)
        if (~far[word]) offer_to<kWeights, kBytes>(64 * word + row, groups);
    }
    near_count_ = 0;
  }

  // kBytes is the length of a code where it is known, else 0.
  template <int kWeights, int64_t kBytes>
  HE_SLICES void offer_to(int64_t query, int64_t groups) {
    const int64_t bytes = kBytes ? kBytes : tile_.code_bytes;
    const uint8_t* const own = queries_.codes + query * bytes;
    uint32_t hits[kMaxNear + 1], distances[kMaxNear], positions[kMaxNear];
    int64_t count = 0;
    for (int64_t group = 0; group < groups; ++group) {
      // Most words have at most two; a loop from the first on would end by surprise.
      uint64_t near = ~far_[64 * group + query % 64][query / 64];
      const uint32_t* const codes = near_codes_ + 64 * group;
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i, near &= near - 1) {
        hits[count] = codes[lowest_bit(near)];
        count += near != 0;
      }
      for (; near; near &= near - 1) hits[count++] = codes[lowest_bit(near)];
    }
    for (int64_t i = 0; i < count; ++i) {
      distances[i] = hamming_distance(own, tile_.codes + hits[i] * bytes, bytes);
      positions[i] = tile_.position_of(hits[i]);
    }
    Selector& selector = selectors_[query];
    selector.offer_all(distances, positions, count);
    if (selector.bound() != bounds_[query]) set_bound<kWeights>(query, selector.bound());
  }

  const HammingTile& tile_;
  const HammingQueries& queries_;
  Selector* const selectors_;
  const Vector* const tables_;
  uint32_t bounds_[kQueries];
  Vector starts_[kMaxWeights + 1];
  Vector far_[kMaxNear];
  uint32_t near_codes_[kMaxNear] = {};
  int64_t near_count_ = 0;
};

}  // namespace hashengine
