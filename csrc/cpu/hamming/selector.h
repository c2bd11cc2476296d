// Selects the k smallest pairs (distance, position) of a stream of candidates that arrives in order of position.
// A histogram of the accepted distances replaces a heap, because distances are small integers. The histogram gives the
// bound: the distance that the next candidate must stay below. The result is in order of position; CandidateLists
// merges the results of all chunks and sorts them by distance.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace hashengine {

// A key is (distance, position) in 32 bits, so that keys are ordered as results are. The distance takes the high bits,
// as many as the length of the codes requires.
struct KeyFormat {
  explicit KeyFormat(int64_t code_bytes) : position_bits(__builtin_clz(uint32_t(8 * code_bytes))) {}

  uint32_t key(uint32_t distance, uint32_t position) const { return distance << position_bits | position; }
  uint32_t distance(uint32_t key) const { return key >> position_bits; }
  uint32_t position(uint32_t key) const { return key & ((1u << position_bits) - 1); }
  int64_t position_count() const { return int64_t(1) << position_bits; }

  int position_bits;
};

// Whether the filter, a bitmap over positions with the least significant bit first, lets a code through. A null filter
// lets every code through.
inline bool passes(const uint8_t* filter, uint32_t position) {
  return filter == nullptr || (filter[position >> 3] >> (position & 7) & 1);
}

class Selector {
 public:
  static constexpr int64_t kMaxPush = 512;  // the most candidates that one call of push_all takes

  // The bytes that a selector takes for a stream of `stream_length` candidates with distances of up to `bits`. Callers
  // derive the number of queries per block from it.
  static int64_t bytes(int64_t bits, int64_t k, int64_t stream_length) {
    return int64_t(sizeof(uint32_t)) * (bits + 2 + max_capacity(k, stream_length));
  }

  // Starts a new stream. The selector accepts only candidates with a distance below `bound` that pass the filter. It
  // stores keys in `buffer`, which has room for `capacity` keys. When `buffer` is full, the keys move to memory that
  // the selector allocates.
  void reset(KeyFormat format, int64_t k, int64_t stream_length, uint32_t bound, const uint8_t* filter,
             uint32_t* buffer, int64_t capacity) {
    format_ = format;
    k_ = size_t(k);
    max_capacity_ = size_t(max_capacity(k, stream_length));
    filter_ = filter;
    count_below_bound_ = 0;
    bound_ = bound;
    histogram_.assign(bound, 0);
    keys_ = buffer;
    capacity_ = size_t(capacity);
    count_ = 0;
    has_k_ = false;
  }

  // The distance that the next candidate must stay below: the bound given to reset or, after k accepted candidates, the
  // distance of the k-th nearest. (A later candidate at exactly that distance is rejected: its position is larger.)
  uint32_t bound() const { return bound_; }

  void push(uint32_t distance, uint32_t position) {
    if (distance >= bound_) return;
    if (!passes(filter_, position)) return;
    make_room(1);
    keys_[count_++] = format_.key(distance, position);
    tighten_bound(1);
  }

  // Pushes several candidates, at most kMaxPush. The bound is updated once, after the last one.
  void push_all(const uint32_t* distances, const uint32_t* positions, int64_t count) {
    make_room(size_t(count));
    const uint32_t bound = bound_;
    const KeyFormat format = format_;
    uint32_t* next = keys_ + count_;
    for (int64_t i = 0; i < count; ++i) {
      *next = format.key(distances[i], positions[i]);
      next += distances[i] < bound && passes(filter_, positions[i]);
    }
    const auto accepted = size_t(next - keys_) - count_;
    count_ += accepted;
    tighten_bound(accepted);
  }

  // The number of results: at most k.
  int64_t found() const { return int64_t(has_k_ ? k_ : count_); }

  // Writes the keys of the results in order of position. May write one more key, so `out` needs room for found() + 1.
  void copy_to(uint32_t* out) const {
    if (has_k_)
      compact(out);
    else
      std::copy_n(keys_, count_, out);
  }

 private:
  // Compacting leaves k keys. There is room for at least k / 2 more. If candidates are pushed one by one, compacting
  // therefore reads at most three keys per key that was accepted since the last compaction.
  static int64_t max_capacity(int64_t k, int64_t stream_length) {
    return std::min(k + std::max(k / 2, kMaxPush), stream_length);
  }

  // Makes room for `count` more keys.
  void make_room(size_t count) {
    if (__builtin_expect(count_ + count > capacity_, 0)) grow(count);
  }

  __attribute__((noinline)) void grow(size_t count) {
    if (count_ + count > max_capacity_) count_ = compact(keys_);
    if (count_ + count <= capacity_) return;
    capacity_ = std::min(std::max<size_t>({2 * capacity_, count_ + count, 512}), max_capacity_);
    std::unique_ptr<uint32_t[]> grown(new uint32_t[capacity_]);
    std::copy(keys_, keys_ + count_, grown.get());
    own_buffer_ = std::move(grown);
    keys_ = own_buffer_.get();
  }

  // Updates the bound after `accepted` keys were added. Fewer than k keys give no bound, so the histogram is empty
  // until there are k keys.
  void tighten_bound(size_t accepted) {
    if (count_ < k_) return;
    const size_t uncounted = has_k_ ? accepted : count_;
    for (size_t i = count_ - uncounted; i < count_; ++i) ++histogram_[format_.distance(keys_[i])];
    count_below_bound_ += uncounted;
    has_k_ = true;
    while (count_below_bound_ >= k_) count_below_bound_ -= histogram_[--bound_];
  }

  // Copies the k results to `out`, which may be keys_: every key below the bound and the first keys at the bound.
  // Returns their number. Branchless, because the branches would be mispredicted.
  size_t compact(uint32_t* out) const {
    const uint32_t bound = bound_;  // a local, because the compiler must assume that a write to `out` changes bound_
    uint64_t ties = k_ - count_below_bound_;
    size_t kept = 0;
    for (size_t i = 0; i < count_; ++i) {
      const uint32_t key = keys_[i], distance = format_.distance(key);
      const uint64_t is_tie = uint64_t(distance == bound) & uint64_t(ties > 0);
      out[kept] = key;
      kept += uint64_t(distance < bound) | is_tie;
      ties -= is_tie;
    }
    return kept;
  }

  size_t count_ = 0;
  size_t capacity_ = 0;
  uint32_t* keys_ = nullptr;
  KeyFormat format_{1};
  uint32_t bound_ = 0;
  bool has_k_ = false;  // whether k keys were accepted; from then on some stored keys may not be below the bound
  uint64_t k_ = 0;
  uint64_t count_below_bound_ = 0;  // accepted keys with a distance below the bound: always less than k
  const uint8_t* filter_ = nullptr;
  std::vector<uint32_t> histogram_;  // [distance]
  size_t max_capacity_ = 0;
  std::unique_ptr<uint32_t[]> own_buffer_;
};

}  // namespace hashengine
