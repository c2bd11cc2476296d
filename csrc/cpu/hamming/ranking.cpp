// Ranking of codes by a counting sort, in two passes over the codes. The first pass counts the codes of each chunk at
// each distance. Prefix sums of these counts give, for each chunk and distance, the rank of the chunk's first code at
// that distance. The second pass writes each code to the entry of its rank, if the rank is less than k.

#include "cpu/hamming/ranking.h"

#include <utility>

#include "cpu/hamming/plan.h"

namespace hashengine {
namespace {

constexpr int64_t kMinChunkCodes = 1 << 14;
constexpr int64_t kMaxCountBytes = int64_t(32) << 20;  // for the counts of all queries that are ranked together

// Calls work(query of the block, position in the chunk, distance) for each code that passes the query's filter, in
// order of position.
template <typename Work>
void for_each_passing_code(WorkItem& item, std::vector<uint32_t>& scratch, Work work) {
  item.for_each_tile_and_query(item.first_code, item.end_code, scratch,
                               [&](int64_t q, const HammingTile& tile, const uint32_t* distances) {
                                 const uint8_t* const filter = item.filter_of(q);
                                 for (int64_t i = 0; i < tile.count; ++i) {
                                   const uint32_t position = tile.position_of(i);
                                   if (passes(filter, position)) work(q, position, distances[i]);
                                 }
                               });
}

}  // namespace

void hamming_rank(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions, SimdLevel level,
                  const ThreadPool& pool) {
  using ThreadScratch = std::vector<uint32_t>;
  const int64_t distance_count = search.distance_count(), row_bytes = distance_count * int64_t(sizeof(int64_t));
  // Assumes four chunks per thread, which is more than a plan usually makes.
  const int64_t batch_queries = std::max<int64_t>(kMaxCountBytes / (row_bytes * 4 * pool.threads), 1);
  for (int64_t first = 0; first < search.query_count; first += batch_queries) {
    const HammingSearch batch = search.slice(first, batch_queries);
    const HammingPlan plan(hamming_kernel(level, batch), batch, row_bytes, kMinChunkCodes, pool.threads);
    // [query, chunk, distance]: first the number of codes, then the rank of the next code.
    std::vector<int64_t> ranks(size_t(batch.query_count * plan.chunks * distance_count), 0);
    const auto row = [&](const WorkItem& item, int64_t q) {
      return ranks.data() + ((item.first_query + q) * plan.chunks + item.chunk) * distance_count;
    };
    for_each_item<ThreadScratch>(plan, batch, pool, [&](WorkItem& item, ThreadScratch& scratch) {
      for_each_passing_code(item, scratch, [&](int64_t q, uint32_t, uint32_t distance) { ++row(item, q)[distance]; });
    });
    for (int64_t q = 0; q < batch.query_count; ++q) {
      int64_t rank = 0;
      for (int64_t distance = 0; distance < distance_count; ++distance)
        for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
          int64_t& entry = ranks[size_t((q * plan.chunks + chunk) * distance_count + distance)];
          rank += std::exchange(entry, rank);
        }
      for (; rank < k; ++rank) {
        distances[(first + q) * k + rank] = int32_t(distance_count);
        positions[(first + q) * k + rank] = -1;
      }
    }
    for_each_item<ThreadScratch>(plan, batch, pool, [&](WorkItem& item, ThreadScratch& scratch) {
      for_each_passing_code(item, scratch, [&](int64_t q, uint32_t position, uint32_t distance) {
        const int64_t rank = row(item, q)[distance]++;
        if (rank >= k) return;
        distances[(first + item.first_query + q) * k + rank] = int32_t(distance);
        positions[(first + item.first_query + q) * k + rank] = item.first_code + position;
      });
    });
  }
}

}  // namespace hashengine
