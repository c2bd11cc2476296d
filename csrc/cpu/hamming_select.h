// The k smallest (distance, position) of a stream of candidates that comes in order of position. Distances are small
// integers, so counting replaces the heap: a histogram of what was accepted gives, after each candidate, the exact bound
// that the next one must stay below. They are put in order of distance by who has all of a query's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace hashengine {

struct HammingCandidate {
  uint32_t distance;
  uint32_t position;
};

class Selector {
 public:
  // Bytes that one selector takes for a stream of `length` candidates; a caller sizes its blocks of queries by it.
  static int64_t bytes(int64_t bits, int64_t k, int64_t length) {
    return int64_t(sizeof(uint32_t)) * (bits + 2) + int64_t(sizeof(HammingCandidate)) * capacity(k, length);
  }

  // Only candidates below `bound` are wanted, and, where there is a filter (a bitmap over positions, the least
  // significant bit first), those that it lets through. `memory` has room for the first of them; where that is all taken,
  // they move.
  void reset(int64_t k, int64_t length, uint32_t bound, const uint8_t* filter, HammingCandidate* memory, int64_t room) {
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
    if (filter_ && !(filter_[position >> 3] >> (position & 7) & 1)) return;
    if (count_ == room_ && !make_room()) return;  // never: compacting makes room
    ++histogram_[distance];
    candidates_[count_++] = {distance, position};
    if (++below_ >= k_) tighten();
  }

  // Drops what is not among the nearest; returns how many are left, at most k.
  int64_t settle() {
    if (is_tight_) compact();
    return int64_t(count_);
  }

  // After settle: as many, in order of position.
  const HammingCandidate* candidates() const { return candidates_; }

 private:
  // Compacting leaves at most k, so its cost is spread over a third as many candidates as it touches.
  static int64_t capacity(int64_t k, int64_t length) { return std::min(k + std::max<int64_t>(k / 2, 512), length); }

  __attribute__((noinline)) bool make_room() {
    if (count_ >= capacity_) compact();
    if (count_ == room_) {
      room_ = std::min(std::max<size_t>(2 * room_, 512), capacity_);
      std::unique_ptr<HammingCandidate[]> grown(new HammingCandidate[room_]);
      std::copy(candidates_, candidates_ + count_, grown.get());
      own_ = std::move(grown);
      candidates_ = own_.get();
    }
    return count_ < room_;
  }

  void tighten() {
    is_tight_ = true;
    while (below_ >= k_) below_ -= histogram_[--bound_];
  }

  // Drops what is farther than the bound, and of those at the bound all but the first that are still needed.
  void compact() {
    uint64_t ties = k_ - below_;
    size_t kept = 0;
    for (size_t i = 0; i < count_; ++i) {
      const HammingCandidate candidate = candidates_[i];
      if (candidate.distance > bound_) continue;
      if (candidate.distance == bound_) {
        if (ties == 0) continue;
        --ties;
      }
      candidates_[kept++] = candidate;
    }
    count_ = kept;
  }

  size_t count_ = 0;
  size_t room_ = 0;  // of candidates_
  HammingCandidate* candidates_ = nullptr;
  uint32_t bound_ = 0;
  bool is_tight_ = false;  // some that were collected may be at the bound or beyond
  uint64_t k_ = 0;
  uint64_t below_ = 0;  // accepted candidates with a distance below the bound; always less than k
  const uint8_t* filter_ = nullptr;
  std::vector<uint32_t> histogram_;
  size_t capacity_ = 0;
  std::unique_ptr<HammingCandidate[]> own_;
};

}  // namespace hashengine
