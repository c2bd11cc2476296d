// Exact Hamming top-k on the CPU.
//
// Idea. A query's selector (selector.h) lowers the query's bound as it accepts candidates. A scan only compares
// distances with the bound. Of N codes in random order, about k (1 + ln(N / k)) become candidates. If k is
// large, a sample of the codes gives the first bound (sample.cpp), so that only a little more than k codes become
// candidates. Each chunk of the database gives a list of candidates per query, and a counting sort merges the lists of
// a query. If k is a large part of the number of codes, all codes are ranked instead, without candidates (ranking.cpp).

#include "cpu/hamming/candidate_lists.h"
#include "cpu/hamming/ranking.h"
#include "cpu/hamming/sample.h"

namespace hashengine {
namespace {

constexpr int64_t kMinChunkCodes = 1 << 16;  // fewer codes are not worth a list per query
constexpr int64_t kMinRankedK = 4096;        // up to this k, ranking all codes is slower, because it takes two passes
constexpr int64_t kRankingShare = 16;        // if k > codes / 16, ranking all codes is faster than lists
constexpr int64_t kBatchListBytes = int64_t(21) << 20;  // for the lists of all queries that are searched together

}  // namespace

void hamming_topk_cpu(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions, SimdLevel level,
                      const ThreadPool& pool) {
  if (k > kMinRankedK && k > search.code_count / kRankingShare)
    return hamming_rank(search, k, distances, positions, level, pool);
  const auto no_bound = uint32_t(search.distance_count());
  const int64_t bytes_per_query = Selector::bytes(no_bound, k, search.code_count);
  const CandidateLimits limits = {k, k, bytes_per_query, std::max(kMinChunkCodes, 4 * k)};
  const int64_t max_queries = kBatchListBytes / (k * int64_t(sizeof(uint32_t)));
  SearchScratch scratch(pool.threads);
  for (int64_t first = 0; first < search.query_count;) {
    const QueryBatch batch = next_batch(search, first, max_queries, bytes_per_query, level);
    const std::vector<uint32_t> bounds = sample_bounds(batch.search, k, level, pool);
    const CandidateLists lists(batch, limits, bounds, pool, scratch);
    parallel_for(pool, batch.search.query_count, ceil_div<int64_t>(1 << 14, k), [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        const int64_t row = (first + q) * k, found = lists.sort(q, k, distances + row, positions + row);
        std::fill(distances + row + found, distances + row + k, int32_t(no_bound));
        std::fill(positions + row + found, positions + row + k, int64_t(-1));
      }
    });
    // Search again, without a bound, for the queries whose sampled bound may have been too tight. The scratch can be
    // reused, because the batch's lists have been sorted.
    for (int64_t q = 0; q < batch.search.query_count; ++q) {
      if (bounds[size_t(q)] == no_bound || lists.found(q) >= k) continue;
      const HammingSearch query = search.slice(first + q, 1);
      const QueryBatch retry = {query, first + q, &hamming_kernel(level, query)};
      CandidateLists(retry, limits, {no_bound}, pool, scratch)
          .sort(0, k, distances + (first + q) * k, positions + (first + q) * k);
    }
    first += batch.search.query_count;
  }
}

}  // namespace hashengine
