// The tiles of a chunk of the database, one after another. A filter that all queries share is applied here: the codes
// that pass it are copied into a tile, once per block of queries, so that the scan processes no other codes.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/hamming/kernel.h"
#include "hashengine/hamming.h"

namespace hashengine {

class TileStream {
 public:
  TileStream(const HammingKernel& kernel, const HammingSearch& search)
      : kernel_(kernel),
        search_(search),
        tile_codes_(kernel.tile_codes(search.code_bytes)),
        shared_filter_(search.filter_stride == 0 ? search.filter : nullptr) {
    const int64_t prepared_bytes = kernel.tile_bytes(tile_codes_, search.code_bytes);
    memory_.reset(new uint8_t[size_t(prepared_bytes + kAlignment)]);
    prepared_ = memory_.get() + (kAlignment - reinterpret_cast<uintptr_t>(memory_.get()) % kAlignment);
    if (shared_filter_) {
      gathered_.resize(size_t(tile_codes_ * search.code_bytes));
      positions_.resize(size_t(tile_codes_));
    }
  }

  int64_t tile_codes() const { return tile_codes_; }

  // Starts a pass over the tiles of codes [begin, end). The positions in the tiles count from code `origin`.
  void start(int64_t origin, int64_t begin, int64_t end) {
    origin_ = origin;
    next_ = begin;
    end_ = end;
  }

  // Prepares the next tile. Returns false if there is none.
  bool next(HammingTile& tile) {
    tile = {prepared_, nullptr, 0, search_.code_bytes, nullptr, uint32_t(next_ - origin_)};
    if (shared_filter_) {
      tile.count = gather();
      tile.codes = gathered_.data();
      tile.positions = positions_.data();
    } else {
      tile.count = std::min(tile_codes_, end_ - next_);
      tile.codes = search_.codes + next_ * search_.code_bytes;
      next_ += tile.count;
    }
    if (tile.count == 0) return false;
    kernel_.prepare_tile(tile.codes, tile.count, search_.code_bytes, prepared_);
    return true;
  }

 private:
  static constexpr int64_t kAlignment = 64;

  // Copies the next codes that pass the filter, at most a tile of them, and returns their number.
  int64_t gather() {
    switch (search_.code_bytes) {
      case 4: return gather_codes<4>();
      case 8: return gather_codes<8>();
      case 16: return gather_codes<16>();
      case 32: return gather_codes<32>();
      default: return gather_codes<0>();
    }
  }

  // kBytes: the length of a code as a constant; 0: any length.
  template <int kBytes>
  int64_t gather_codes() {
    const auto code_bytes = size_t(kBytes ? kBytes : search_.code_bytes);
    int64_t count = 0;
    while (next_ < end_ && count < tile_codes_) {
      const int64_t word_begin = next_ / 64 * 64, word_end = std::min(word_begin + 64, end_);
      uint64_t passing = load_code_word(shared_filter_ + word_begin / 8, (word_end - word_begin + 7) / 8);
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
  const uint8_t* const shared_filter_;
  std::unique_ptr<uint8_t[]> memory_;
  uint8_t* prepared_;  // aligned, inside memory_
  std::vector<uint8_t> gathered_;
  std::vector<uint32_t> positions_;
  int64_t origin_ = 0, next_ = 0, end_ = 0;
};

}  // namespace hashengine
