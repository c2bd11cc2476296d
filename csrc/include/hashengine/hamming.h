// Hamming search over packed codes: d(q, x) = popcount(q ^ x). Results are ordered by (distance, position).
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "hashengine/parallel.h"
#include "hashengine/simd_level.h"

namespace hashengine {

constexpr int64_t kHammingMaxBytes = 8192;  // of a code: a distance leaves room for positions in 32 bits

// The queries, the codes, and an optional filter that says which codes may be found.
struct HammingSearch {
  const uint8_t* queries;  // [query_count, code_bytes]
  const uint8_t* codes;    // [code_count, code_bytes]
  int64_t query_count;
  int64_t code_count;
  int64_t code_bytes;
  const uint8_t* filter;  // bitmap over the positions, least significant bit first; null: every code may be found
  int64_t filter_stride;  // bytes from one query's bitmap to the next; 0: all queries share one bitmap

  // The number of different distances: 0 to the number of bits.
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

// distances, positions: [query_count, k], 1 <= k <= code_count. Where the filter leaves fewer than k codes, the rest is
// 8 code_bytes + 1 and -1.
void hamming_topk_cpu(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions, SimdLevel level,
                      const ThreadPool& pool);

// Query q has distances and positions [lims[q], lims[q + 1]).
struct HammingRangeResult {
  std::vector<int64_t> lims;
  std::unique_ptr<int32_t[]> distances;
  std::unique_ptr<int64_t[]> positions;

  int64_t count() const { return lims.back(); }
};

// At a distance of at most `radius`; of a query with more than `max_results` >= 1, the nearest.
HammingRangeResult hamming_range_cpu(const HammingSearch& search, int64_t radius, int64_t max_results, SimdLevel level,
                                     const ThreadPool& pool);

// Which codes are relevant to which queries. Rows of 64-bit words, of queries [query_count, words] and of codes
// [code_count, words]: relevant where the rows are equal, or, if `any`, where they share a set bit.
struct HammingLabels {
  const uint64_t* queries;
  const uint64_t* codes;
  int64_t words;
  bool any;
};

// counts, relevant: [query_count, 8 code_bytes + 1], the number of codes at each distance; without labels, relevant is
// not touched.
void hamming_count_cpu(const HammingSearch& search, const HammingLabels* labels, int64_t* counts, int64_t* relevant,
                       SimdLevel level, const ThreadPool& pool);

}  // namespace hashengine
