// Which codes of a tile are relevant to a query.
//
// If labels are numbers of a few classes, a tile has a list of the codes of each class. A query then visits only its
// relevant codes. Otherwise, its relevance to every code is computed, as a byte.
//
// The labels are read 16 bits at a time, because every CPU of an architecture compares vectors of such values: a plane
// has the same 16 bits of the labels of all codes of the tile. Planes that cannot make a difference are left out, so
// class numbers below 65,536 take one plane.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/hamming/histogram.h"
#include "cpu/hamming/kernel.h"
#include "hashengine/hamming.h"

namespace hashengine {

constexpr int kMaxClasses = 1 << 12;  // their counters must take little time beside the codes of a tile
// If more codes are relevant to a query, visiting them takes longer than computing the relevance of all (measured).
constexpr double kMaxRelevantShare = 0.25;

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
    if (!labels.any && count() == 1) find_classes(code_count);
  }

  int64_t count() const { return int64_t(planes_.size()); }
  bool any() const { return labels_.any; }
  // The number of classes of the codes, if plane 0 has the class of each code and lists of their codes pay; otherwise
  // 0.
  int classes() const { return classes_; }
  const uint16_t* class_of_code() const { return class_of_code_.data(); }

  uint16_t of_query(int64_t query, int64_t plane) const { return at(labels_.queries, query, plane); }

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

  void find_classes(int64_t code_count) {
    class_of_code_.resize(size_t(code_count));
    std::vector<int64_t> sizes(kMaxClasses);
    for (int64_t code = 0; code < code_count; ++code) {
      const uint16_t label = class_of_code_[size_t(code)] = at(labels_.codes, code, 0);
      if (label >= kMaxClasses) {
        classes_ = 0;
        return;
      }
      ++sizes[label];
      classes_ = std::max(classes_, label + 1);
    }
    double pairs = 0;  // of codes of the same class
    for (const int64_t size : sizes) pairs += double(size) * double(size);
    if (pairs > kMaxRelevantShare * double(code_count) * double(code_count)) classes_ = 0;
  }

  uint16_t at(const uint64_t* labels, int64_t row, int64_t plane) const {
    const Place place = planes_[size_t(plane)];
    return uint16_t(labels[row * labels_.words + place.word] >> place.shift);
  }

  const HammingLabels labels_;
  std::vector<Place> planes_;
  std::vector<uint16_t> class_of_code_;
  int classes_ = 0;
};

class TileLabels {
 public:
  // Reads the labels of the codes of a tile. first_code: the code of the database at position 0 of the tile's chunk.
  void set(const LabelPlanes& planes, int64_t first_code, const HammingTile& tile) {
    count_ = tile.count;
    if (planes.classes()) return list_classes(planes.class_of_code() + first_code, planes.classes(), tile);
    codes_.resize(size_t(planes.count() * count_));
    bits_.resize(size_t(count_));
    for (int64_t plane = 0; plane < planes.count(); ++plane)
      planes.read_codes(plane, first_code, tile, codes_.data() + plane * count_);
  }

  // Adds the values of the codes of a class to counters [value, bank].
  template <typename Value>
  void count_class(uint16_t label, const Value* values, uint32_t* counters) const {
    if (label >= begins_.size()) return;  // no code has that class
    const uint32_t* const codes = members_.data();
    int64_t i = begins_[label];
    const int64_t end = label + size_t(1) < begins_.size() ? begins_[label + size_t(1)] : count_;
    for (; i + kCounterBanks <= end; i += kCounterBanks)
#pragma GCC unroll 4
      for (int64_t bank = 0; bank < kCounterBanks; ++bank) ++counters[values[codes[i + bank]] * kCounterBanks + bank];
    for (; i < end; ++i) ++counters[values[codes[i]] * kCounterBanks];
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
  // Sorts the codes of the tile by class. class_of_code: from position 0 of the tile's chunk on.
  void list_classes(const uint16_t* class_of_code, int classes, const HammingTile& tile) {
    begins_.assign(size_t(classes), 0);
    members_.resize(size_t(count_));
    const uint16_t* codes = class_of_code + tile.first_position;
    if (tile.positions) {
      codes_.resize(size_t(count_));
      for (int64_t i = 0; i < count_; ++i) codes_[size_t(i)] = class_of_code[tile.positions[i]];
      codes = codes_.data();
    }
    uint32_t* __restrict const begins = begins_.data();
    uint32_t* __restrict const members = members_.data();
    for (int64_t i = 0; i < count_; ++i) ++begins[codes[i]];
    for (int label = 1; label < classes; ++label) begins[label] += begins[label - 1];
    for (int64_t i = count_; i-- > 0;) members[--begins[codes[i]]] = uint32_t(i);  // until here, they are the ends
  }

  int64_t count_ = 0;
  std::vector<uint16_t> codes_;  // [plane, code of the tile]
  std::vector<uint16_t> bits_;
  std::vector<uint32_t> members_;  // the codes of the tile, by class
  std::vector<uint32_t> begins_;   // [class]: the first of its codes in members_
};

}  // namespace hashengine
