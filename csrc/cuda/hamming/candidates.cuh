// The candidates of a top-k search: the codes that a scan keeps for the selection.
//
// Key. A distance and a position, packed into one number so that keys are ordered like results.
//
// Bound. The largest key that a candidate may have; each query has its own. bounds.cu estimates it from a sample. It is
// usually the key of a code slightly farther from the query than the k-th nearest code. Because a bound includes a
// position, it admits only some of the codes at its own distance. Therefore a query has few candidates even if all
// codes of the database are equal. If a bound admits too few or too many candidates, the selection (select.cu) detects
// it and reads all codes instead. The bound of a query whose own filter selects few codes is 0, the key of the code at
// position 0 if that equals the query: scan_own_filter.cu adds all others. No other bound is 0, because at least four
// sampled codes are nearer than a bound (HammingTopkPlan).
//
// Tightening. Once k candidates are nearer than the bound, a code farther than all of them cannot be a result.
// Therefore a scan recomputes each query's maximum distance before each chunk, from counters of the candidates found so
// far. Other blocks may be incrementing these counters. A counter that is read too early is too small, and makes the
// maximum distance too large. This admits unnecessary candidates, but loses none of the k nearest codes. In scan_wgmma,
// each block does this for a share of the queries, and publishes the result beside the bound.
#pragma once

#include "cuda/hamming/device_search.cuh"

namespace hashengine {

struct DeviceKeyFormat {
  int position_bits;  // a key's lowest position_bits bits hold the position, the bits above hold the distance

  HE_HOST_DEVICE uint64_t key(int64_t distance, int64_t position) const {
    return static_cast<uint64_t>(distance) << position_bits | static_cast<uint64_t>(position);
  }
  HE_HOST_DEVICE int distance(uint64_t key) const { return static_cast<int>(key >> position_bits); }
  HE_HOST_DEVICE int64_t position(uint64_t key) const {
    return static_cast<int64_t>(key & ((uint64_t{1} << position_bits) - 1));
  }
};

struct Candidates {
  // A candidate's margin is the distance of the query's bound minus the distance of the candidate. The first
  // kFineMargins counters of a query have one margin each; all margins of kFineMargins - 1 or more are counted
  // together. A margin of kFineMargins or more is also counted by one of the other counters, which divide these margins
  // into ranges of equal length. They let a scan tighten a bound that admits every code.
  static constexpr int kFineMargins = 16, kMargins = 32;

  // The lowest kKeyBits bits of an element of `bounds` are the bound. The bits above hold the margin by which
  // scan_wgmma has tightened it, initially 0.
  static constexpr int kKeyBits = 48;

  // The bound of a query whose own filter selects few codes.
  static constexpr uint64_t kSelective = 0;

  uint64_t* keys;           // [query_count, capacity], unordered; candidates beyond the capacity are only counted
  uint64_t* bounds;         // [query_count]
  unsigned* counts;         // [query_count], candidates per query, including those beyond the capacity
  unsigned* margin_counts;  // [query_count, kMargins], candidates per query and margin or range of margins
  int64_t capacity;         // candidates per query for which `keys` has space
  unsigned k;               // results per query
  DeviceKeyFormat format;

  __device__ __forceinline__ uint64_t bound(int64_t query) const { return key_of(bounds[query]); }
  __device__ __forceinline__ bool is_selective(int64_t query) const { return bound(query) == kSelective; }

  // Adds a code to the candidates of a query. The caller must not add a code twice. The margin is not counted, so this
  // never tightens the bound.
  __device__ __forceinline__ void add(int64_t query, uint64_t key) const {
    const int64_t slot = atomicAdd(&counts[query], 1u);
    if (slot < capacity) keys[query * capacity + slot] = key;
  }

  // Adds a code at the given distance to the candidates if it is within the query's bound and passes the filter. A scan
  // may call this for any code, but at most once per query and code.
  __device__ __forceinline__ void add_if_within_bound(const DeviceSearch& search, int64_t query, int64_t position,
                                                      int distance) const {
    const uint64_t key = format.key(distance, position), limit = bound(query);
    if (key > limit || !search.passes_filter(query, position)) return;
    const int bound_distance = format.distance(limit), margin = bound_distance - distance;
    unsigned* const margins = margin_counts + query * kMargins;
    atomicAdd(margins + min(margin, kFineMargins - 1), 1u);
    if (margin >= kFineMargins)
      atomicAdd(margins + kFineMargins + unsigned(margin - kFineMargins) / unsigned(range_length(bound_distance)), 1u);
    add(query, key);
  }

  // The same, with the distance that it computes.
  __device__ __forceinline__ void add_if_within_bound(const DeviceSearch& search, int64_t query,
                                                      int64_t position) const {
    add_if_within_bound(search, query, position, search.distance(query, position));
  }

  // The largest distance at which a code at position `first` or later can still be among the k nearest codes; -1 if no
  // such code can be. It shrinks during a scan: if k candidates have a margin of at least m, the distance of the k-th
  // nearest code is at most the bound's distance minus m. Reads the first kFineMargins counters.
  __device__ __forceinline__ int max_distance(int64_t query, int64_t first) const {
    return max_distance(bound(query), fine_margin(query), first);
  }

  // The same, with the margin that tighten() has published.
  __device__ __forceinline__ int published_max_distance(int64_t query, int64_t first) const {
    const uint64_t published = __ldcg(bounds + query);  // from L2, where the other blocks' atomics take place
    return max_distance(key_of(published), static_cast<int>(published >> kKeyBits), first);
  }

  // Publishes the largest margin that k candidates have, according to all counters.
  __device__ __forceinline__ void tighten(int64_t query) const {
    const uint64_t published = __ldcg(bounds + query), limit = key_of(published);
    int margin = fine_margin(query);
    if (margin == kFineMargins - 1) {
      unsigned accepted = 0;  // the number of candidates in range i or a later one
      for (int i = kMargins - kFineMargins - 1; i >= 0 && accepted < k; --i) {
        accepted += __ldcg(margin_counts + query * kMargins + kFineMargins + i);
        if (accepted >= k) margin = kFineMargins + i * range_length(format.distance(limit));
      }
    }
    if (static_cast<unsigned>(margin) <= published >> kKeyBits) return;
    atomicMax(reinterpret_cast<unsigned long long*>(bounds + query),
              static_cast<unsigned long long>(margin) << kKeyBits | limit);
  }

 private:
  static __device__ __forceinline__ uint64_t key_of(uint64_t published) {
    return published & ((uint64_t{1} << kKeyBits) - 1);
  }

  // The length of a range of margins. The last range contains the largest margin, which is the bound's distance.
  static __device__ __forceinline__ int range_length(int bound_distance) {
    return max(bound_distance - kFineMargins, 0) / (kMargins - kFineMargins) + 1;
  }

  __device__ __forceinline__ int max_distance(uint64_t bound, int margin, int64_t first) const {
    const int distance = format.distance(bound);
    return min(distance - margin, distance - (format.position(bound) < first ? 1 : 0));
  }

  // The largest margin below kFineMargins that at least k candidates have.
  __device__ __forceinline__ int fine_margin(int64_t query) const {
    const auto* counts_by_four = reinterpret_cast<const uint4*>(margin_counts + query * kMargins);
    unsigned accepted = 0;  // the number of candidates whose margin is at least 4 * i + j
    int margin = 0;
#pragma unroll
    for (int i = kFineMargins / 4 - 1; i >= 0; --i) {
      const uint4 four = __ldcg(counts_by_four + i);  // from L2, where the other blocks' atomics take place
      const unsigned counted[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 3; j >= 0; --j) {
        accepted += counted[j];
        if (accepted >= k) margin = max(margin, 4 * i + j);
      }
    }
    return margin;
  }
};

}  // namespace hashengine
