// Exact Hamming search within a radius on the CPU: like a search for the max_results nearest codes (hamming_topk.cpp),
// except that the first bound of every query is radius + 1 (exclusive).

#include "cpu/hamming/candidate_lists.h"
#include "hashengine/huge_pages.h"

namespace hashengine {
namespace {

constexpr int64_t kMinChunkCodes = 1 << 16;   // a smaller chunk is not worth its lists, one per query
constexpr int64_t kExpectedResults = 1024;    // per query; for more results the buffers grow
constexpr int64_t kMinQueriesPerThread = 16;  // one thread sorts the results of fewer queries faster

// Copies the first `count` values to a new array with room for `capacity` values.
template <typename T>
std::unique_ptr<T[]> grown(const std::unique_ptr<T[]>& values, int64_t count, int64_t capacity) {
  std::unique_ptr<T[]> copy(new T[size_t(capacity)]);
  use_huge_pages(copy.get(), capacity * int64_t(sizeof(T)));
  std::copy_n(values.get(), count, copy.get());
  return copy;
}

}  // namespace

HammingRangeResult hamming_range_cpu(const HammingSearch& search, int64_t radius, int64_t max_results, SimdLevel level,
                                     const ThreadPool& pool) {
  const int64_t expected = std::min(max_results, kExpectedResults);
  const int64_t bytes_per_query = Selector::bytes(radius, expected, search.code_count);
  const CandidateLimits limits = {max_results, expected, bytes_per_query, kMinChunkCodes};
  SearchScratch scratch(pool.threads);
  HammingRangeResult result;
  result.lims.push_back(0);
  for (int64_t first = 0; first < search.query_count;) {
    const QueryBatch batch = next_batch(search, first, search.query_count, bytes_per_query, level);
    const std::vector<uint32_t> bounds(size_t(batch.search.query_count), uint32_t(radius + 1));
    const CandidateLists lists(batch, limits, bounds, pool, scratch);
    for (int64_t q = 0; q < batch.search.query_count; ++q)
      result.lims.push_back(result.lims.back() + std::min(lists.found(q), max_results));
    const int64_t before = result.lims[size_t(first)];
    result.distances = grown(result.distances, before, result.count());
    result.positions = grown(result.positions, before, result.count());
    parallel_for(pool, batch.search.query_count, kMinQueriesPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        const int64_t at = result.lims[size_t(first + q)];
        lists.sort(q, result.lims[size_t(first + q) + 1] - at, result.distances.get() + at,
                   result.positions.get() + at);
      }
    });
    first += batch.search.query_count;
  }
  return result;
}

}  // namespace hashengine
