// The k smallest (distance, position) of a stream of candidates that comes in order of position. Distances are small
// integers, so counting replaces the heap: a histogram of what was accepted gives, after each candidate, the exact
// bound that the next one must stay below. They are put in order of distance by who has all of a query's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace hashengine {

// A distance and a position in 32 bits; the distance takes the highest, as many as the length of a code needs.
struct HammingCandidates {
  explicit HammingCandidates(int64_t code_bytes) : position_bits(__builtin_clz(uint32_t(8 * code_bytes))) {}

  uint32_t pack(uint32_t distance, uint32_t position) const { return distance << position_bits | position; }
  uint32_t distance(uint32_t candidate) const { return candidate >> position_bits; }
  uint32_t position(uint32_t candidate) const { return candidate & ((1u << position_bits) - 1); }
  int64_t positions() const { return int64_t(1) << position_bits; }  // that there are

  int position_bits;
};

// Whether a bitmap over positions, the least significant bit first, has one; where there is none, it passes.
inline bool passes(const uint8_t* filter, uint32_t position) {
  return filter == nullptr || (filter[position >> 3] >> (position & 7) & 1);
}

class Selector {
 public:
  static constexpr int64_t kMostTogether = 512;  // that are offered at once

  // Bytes that one selector takes for a stream of `length` candidates; a caller sizes its blocks of queries by it.
  static int64_t bytes(int64_t bits, int64_t k, int64_t length) {
    return int64_t(sizeof(uint32_t)) * (bits + 2 + capacity(k, length));
  }

  // Only candidates below `bound` are wanted, and only those that pass the filter. `memory` has room for the first of
  // them; where that is all taken, they move.
  void reset(HammingCandidates format, int64_t k, int64_t length, uint32_t bound, const uint8_t* filter,
             uint32_t* memory, int64_t room) {
    format_ = format;
    k_ = size_t(k);
    capacity_ = size_t(capacity(k, length));
    filter_ = filter;
    below_ = 0;
    bound_ = bound;
    histogram_.assign(bound, 0);
    candidates_ = memory;
    room_ = size_t(room);
    count_ = 0;
    is_tight_ = false;
  }

  // Only candidates with a distance below the bound can still be among the k nearest: k others are at most as far and
  // stand before them.
  uint32_t bound() const { return bound_; }

  void offer(uint32_t distance, uint32_t position) {
    if (distance >= bound_) return;
    if (!passes(filter_, position)) return;
    make_room(1);
    candidates_[count_++] = format_.pack(distance, position);
    learn(1);
  }

  // As offer, of several, at most kMostTogether; the bound learns of them at the end.
  void offer_all(const uint32_t* distances, const uint32_t* positions, int64_t count) {
    make_room(size_t(count));
    const uint32_t bound = bound_;
    const HammingCandidates format = format_;
    uint32_t* next = candidates_ + count_;
    for (int64_t i = 0; i < count; ++i) {
      *next = format.pack(distances[i], positions[i]);
      next += distances[i] < bound && passes(filter_, positions[i]);
    }
    const auto accepted = size_t(next - candidates_) - count_;
    count_ += accepted;
    learn(accepted);
  }

  // How many there are, at most k.
  int64_t found() const { return int64_t(is_tight_ ? k_ : count_); }

  // Writes them, in order of position, and maybe something behind.
  void copy_to(uint32_t* out) const {
    if (is_tight_)
      pick(out);
    else
      std::copy_n(candidates_, count_, out);
  }

 private:
  // Compacting leaves at most k, so its cost is spread over a third as many candidates as it touches.
  static int64_t capacity(int64_t k, int64_t length) { return std::min(k + std::max(k / 2, kMostTogether), length); }

  // For so many more.
  void make_room(size_t count) {
    if (__builtin_expect(count_ + count > room_, 0)) grow(count);
  }

  __attribute__((noinline)) void grow(size_t count) {
    if (count_ + count > capacity_) count_ = pick(candidates_);
    if (count_ + count <= room_) return;
    room_ = std::min(std::max<size_t>({2 * room_, count_ + count, 512}), capacity_);
    std::unique_ptr<uint32_t[]> grown(new uint32_t[room_]);
    std::copy(candidates_, candidates_ + count_, grown.get());
    own_ = std::move(grown);
    candidates_ = own_.get();
  }

  // Tightens the bound by the last candidates. Before there are k, nothing follows from them, and none is counted.
  void learn(size_t accepted) {
    if (count_ < k_) return;
    const size_t news = is_tight_ ? accepted : count_;
    for (size_t i = count_ - news; i < count_; ++i) ++histogram_[format_.distance(candidates_[i])];
    below_ += news;
    is_tight_ = true;
    while (below_ >= k_) below_ -= histogram_[--bound_];
  }

  // Leaves out what is farther than the bound, and of those at the bound all but the first that are still needed.
  // Returns how many are left. Without branches, which would be guessed.
  size_t pick(uint32_t* out) const {
    const uint32_t bound = bound_;  // which writing through `out` might change, for all that the compiler knows
    uint64_t ties = k_ - below_;
    size_t picked = 0;
    for (size_t i = 0; i < count_; ++i) {
      const uint32_t candidate = candidates_[i], distance = format_.distance(candidate);
      const uint64_t is_tie = uint64_t(distance == bound) & uint64_t(ties > 0);
      out[picked] = candidate;
      picked += uint64_t(distance < bound) | is_tie;
      ties -= is_tie;
    }
    return picked;
  }

  size_t count_ = 0;
  size_t room_ = 0;  // of candidates_
  uint32_t* candidates_ = nullptr;
  HammingCandidates format_{1};
  uint32_t bound_ = 0;
  bool is_tight_ = false;  // some that were collected may be at the bound or beyond
  uint64_t k_ = 0;
  uint64_t below_ = 0;  // accepted candidates with a distance below the bound; always less than k
  const uint8_t* filter_ = nullptr;
  std::vector<uint32_t> histogram_;
  size_t capacity_ = 0;
  std::unique_ptr<uint32_t[]> own_;
};

}  // namespace hashengine
