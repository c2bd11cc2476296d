// Hamming search over packed codes: distance(q, x) = popcount(q ^ x). Results are ordered by (distance, position). The
// position of a code is its row in `codes`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "hashengine/parallel.h"
#include "hashengine/simd_level.h"

namespace hashengine {

// The length of the longest supported code. Distances between such codes are at most 65,536, which takes 17 bits. A
// 32-bit key of the CPU search (KeyFormat in cpu/hamming/selector.h) then has 15 bits for the position.
constexpr int64_t kHammingMaxBytes = 8192;

// The inputs of a search: the queries, the codes that are searched, and an optional filter. A code that the filter
// excludes is never a result.
struct HammingSearch {
  const uint8_t* queries;  // [query_count, code_bytes]
  const uint8_t* codes;    // [code_count, code_bytes]
  int64_t query_count;
  int64_t code_count;
  int64_t code_bytes;
  const uint8_t* filter;  // a bitmap over positions, least significant bit first; null: no code is excluded
  int64_t filter_stride;  // bytes from one query's bitmap to the next; 0: all queries share one bitmap

  // The number of possible distances, which are 0 to 8 * code_bytes.
  int64_t distance_count() const { return 8 * code_bytes + 1; }

  // The same search for at most `count` queries, starting with query `first`.
  HammingSearch slice(int64_t first, int64_t count) const {
    HammingSearch part = *this;
    part.queries += first * code_bytes;
    if (filter != nullptr) part.filter += first * filter_stride;
    part.query_count = std::min(count, query_count - first);
    return part;
  }
};

// The k nearest codes of each query. distances, positions: [query_count, k], 1 <= k <= code_count. If the filter leaves
// fewer than k codes, the remaining entries are distance_count() in `distances` and -1 in `positions`.
void hamming_topk_cpu(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions, SimdLevel level,
                      const ThreadPool& pool);

// The results of query q are entries [lims[q], lims[q + 1]) of distances and positions.
struct HammingRangeResult {
  std::vector<int64_t> lims;
  std::unique_ptr<int32_t[]> distances;
  std::unique_ptr<int64_t[]> positions;

  int64_t count() const { return lims.back(); }
};

// The codes within distance `radius` of each query, nearest first. A query with more than `max_results` (at least 1)
// such codes gets the nearest `max_results`.
HammingRangeResult hamming_range_cpu(const HammingSearch& search, int64_t radius, int64_t max_results, SimdLevel level,
                                     const ThreadPool& pool);

// Labels say which codes are relevant to which queries. Each query and each code has a row of 64-bit words: queries
// [query_count, words], codes [code_count, words]. If `any` is false, a code is relevant if its row equals the query's.
// If `any` is true, a code is relevant if the two rows share a set bit.
struct HammingLabels {
  const uint64_t* queries;
  const uint64_t* codes;
  int64_t words;
  bool any;
};

// Counts the codes at each distance from each query. A code that the filter excludes is not counted. counts:
// [query_count, distance_count()], the number of codes. relevant: of the same shape, the number of relevant codes; not
// written if `labels` is null.
void hamming_count_cpu(const HammingSearch& search, const HammingLabels* labels, int64_t* counts, int64_t* relevant,
                       SimdLevel level, const ThreadPool& pool);

}  // namespace hashengine
