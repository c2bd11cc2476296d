// The tiles of a part of the database, one after another. A filter that all queries share is applied here: the codes
// that it lets through are gathered, once for a block of queries, and the scan sees no others.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "hamming_kernel.h"
#include "hashengine/hamming.h"

namespace hashengine {

class TileStream {
 public:
  TileStream(const HammingKernel& kernel, const HammingSearch& search)
      : kernel_(kernel),
        search_(search),
        tile_codes_(kernel.tile_codes(search.code_bytes)),
        filter_(search.filter_stride == 0 ? search.filter : nullptr) {
    const int64_t rows = kernel.tile_bytes(tile_codes_, search.code_bytes);
    memory_.reset(new uint8_t[size_t(rows + kAlignment)]);
    rows_ = memory_.get() + (kAlignment - reinterpret_cast<uintptr_t>(memory_.get()) % kAlignment);
    if (filter_) {
      gathered_.resize(size_t(tile_codes_ * search.code_bytes));
      positions_.resize(size_t(tile_codes_));
    }
  }

  int64_t tile_codes() const { return tile_codes_; }

  // Begins the tiles of codes [first, last), whose positions in the tiles count from `origin`.
  void start(int64_t origin, int64_t first, int64_t last) {
    origin_ = origin;
    next_ = first;
    last_ = last;
  }

  // Lays out the next tile; false after the last.
  bool next(HammingTile& tile) {
    tile = {rows_, nullptr, 0, search_.code_bytes, nullptr, uint32_t(next_ - origin_)};
    if (filter_) {
      tile.count = gather();
      tile.codes = gathered_.data();
      tile.positions = positions_.data();
    } else {
      tile.count = std::min(tile_codes_, last_ - next_);
      tile.codes = search_.codes + next_ * search_.code_bytes;
      next_ += tile.count;
    }
    if (tile.count == 0) return false;
    kernel_.prepare_tile(tile.codes, tile.count, search_.code_bytes, rows_);
    return true;
  }

 private:
  static constexpr int64_t kAlignment = 64;

  int64_t gather() {
    switch (search_.code_bytes) {
      case 4: return gather_codes<4>();
      case 8: return gather_codes<8>();
      case 16: return gather_codes<16>();
      case 32: return gather_codes<32>();
      default: return gather_codes<0>();
    }
  }

  template <int kBytes>
  int64_t gather_codes() {
    const auto code_bytes = size_t(kBytes ? kBytes : search_.code_bytes);
    int64_t count = 0;
    while (next_ < last_ && count < tile_codes_) {
      const int64_t word_begin = next_ / 64 * 64, word_end = std::min(word_begin + 64, last_);
      uint64_t passing = load_code_word(filter_ + word_begin / 8, (word_end - word_begin + 7) / 8);
      passing &= ~uint64_t(0) << (next_ - word_begin);
      if (word_end - word_begin < 64) passing &= ~(~uint64_t(0) << (word_end - word_begin));
      for (; passing && count < tile_codes_; passing &= passing - 1, ++count) {
        const int64_t code = word_begin + __builtin_ctzll(passing);
        std::memcpy(gathered_.data() + size_t(count) * code_bytes, search_.codes + size_t(code) * code_bytes,
                    code_bytes);
        positions_[size_t(count)] = uint32_t(code - origin_);
      }
      next_ = passing ? word_begin + __builtin_ctzll(passing) : word_end;
    }
    return count;
  }

  const HammingKernel& kernel_;
  const HammingSearch& search_;
  const int64_t tile_codes_;
  const uint8_t* const filter_;
  std::unique_ptr<uint8_t[]> memory_;
  uint8_t* rows_;
  std::vector<uint8_t> gathered_;
  std::vector<uint32_t> positions_;
  int64_t origin_ = 0, next_ = 0, last_ = 0;
};

}  // namespace hashengine
