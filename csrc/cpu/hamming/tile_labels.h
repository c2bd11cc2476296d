// Which codes of a tile are relevant to a query, as bytes.
//
// The labels are read 16 bits at a time, because every CPU of an architecture compares vectors of such values: a plane
// has the same 16 bits of the labels of all codes of the tile. Planes that cannot make a difference are left out, so
// class numbers below 65,536 take one plane.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/hamming/kernel.h"
#include "hashengine/hamming.h"

namespace hashengine {

// Where the planes of a search are in a row of labels. The same for all tiles.
class LabelPlanes {
 public:
  LabelPlanes(const HammingLabels& labels, int64_t query_count, int64_t code_count) : labels_(labels) {
    for (int64_t word = 0; word < labels.words; ++word) {
      // The bits that may make a difference: those that a query has or, if whole labels are compared, those in which
      // labels differ.
      uint64_t bits = 0;
      const uint64_t same = labels.any || query_count == 0 ? 0 : labels.queries[word];
      for (int64_t q = 0; q < query_count; ++q) bits |= labels.queries[q * labels.words + word] ^ same;
      if (!labels.any)
        for (int64_t code = 0; code < code_count; ++code) bits |= labels.codes[code * labels.words + word] ^ same;
      for (int shift = 0; shift < 64; shift += 16)
        if (bits >> shift & 0xffff) planes_.push_back({word, shift});
    }
  }

  int64_t count() const { return int64_t(planes_.size()); }
  bool any() const { return labels_.any; }

  uint16_t of_query(int64_t query, int64_t plane) const {
    const Place place = planes_[size_t(plane)];
    return uint16_t(labels_.queries[query * labels_.words + place.word] >> place.shift);
  }

  void read_codes(int64_t plane, int64_t first_code, const HammingTile& tile, uint16_t* out) const {
    const Place place = planes_[size_t(plane)];
    const int64_t words = labels_.words;
    const uint64_t* const labels = labels_.codes + first_code * words + place.word;
    for (int64_t i = 0; i < tile.count; ++i) out[i] = uint16_t(labels[tile.position_of(i) * words] >> place.shift);
  }

 private:
  struct Place {
    int64_t word;
    int shift;
  };

  const HammingLabels labels_;
  std::vector<Place> planes_;
};

class TileLabels {
 public:
  // Reads the labels of the codes of a tile. first_code: the code of the database at position 0 of the tile's chunk.
  void set(const LabelPlanes& planes, int64_t first_code, const HammingTile& tile) {
    count_ = tile.count;
    codes_.resize(size_t(planes.count() * count_));
    bits_.resize(size_t(count_));
    for (int64_t plane = 0; plane < planes.count(); ++plane)
      planes.read_codes(plane, first_code, tile, codes_.data() + plane * count_);
  }

  // Adds `step` to the value of each code that is relevant to the query.
  template <typename Value>
  void add_relevance(const LabelPlanes& planes, int64_t query, Value step, Value* __restrict values) {
    const int64_t count = count_;  // a local, because the compiler must assume that a write to `values` changes count_
    // If any shared bit makes a code relevant: the shared bits. Otherwise: the bits that differ.
    uint16_t* __restrict const bits = bits_.data();
    std::fill(bits, bits + count, uint16_t(0));
    for (int64_t plane = 0; plane < planes.count(); ++plane) {
      const uint16_t* __restrict const codes = codes_.data() + plane * count;
      const uint16_t label = planes.of_query(query, plane);
      if (planes.any())
        for (int64_t i = 0; i < count; ++i) bits[i] = uint16_t(bits[i] | (codes[i] & label));
      else
        for (int64_t i = 0; i < count; ++i) bits[i] = uint16_t(bits[i] | (codes[i] ^ label));
    }
    if (planes.any())
      for (int64_t i = 0; i < count; ++i) values[i] = Value(values[i] + (bits[i] != 0 ? step : 0));
    else
      for (int64_t i = 0; i < count; ++i) values[i] = Value(values[i] + (bits[i] == 0 ? step : 0));
  }

 private:
  int64_t count_ = 0;
  std::vector<uint16_t> codes_;  // [plane, code of the tile]
  std::vector<uint16_t> bits_;
};

}  // namespace hashengine
