// Ranking of codes by a counting sort, in two passes over the codes. The first pass counts the codes of each chunk at
// each distance. Prefix sums of these counts give, for each chunk and distance, the rank of the chunk's first code at
// that distance. The second pass writes the position of each code to the entry of its rank, if the rank is less than k.
// The distances of the entries follow from the prefix sums.

#include "cpu/hamming/ranking.h"

#include <utility>

#include "cpu/hamming/histogram.h"
#include "cpu/hamming/plan.h"

namespace hashengine {
namespace {

constexpr int64_t kMinChunkCodes = 1 << 14;
constexpr int64_t kMaxCountBytes = int64_t(32) << 20;  // for the counts of all queries that are ranked together

template <typename Distance>
struct ThreadScratch {
  std::vector<Distance> distances;  // from one query to the codes of a tile
  std::vector<uint32_t> counts;     // [query, distance, bank]
  std::vector<uint32_t> kept;       // the codes of a tile whose distance may give a rank below k
};

// One batch of queries.
class Ranking {
 public:
  Ranking(const HammingPlan& plan, const HammingSearch& batch, int64_t k, int32_t* distances, int64_t* positions)
      : plan_(plan),
        batch_(batch),
        k_(k),
        distance_count_(batch.distance_count()),
        distances_(distances),
        positions_(positions),
        ranks_(size_t(batch.query_count * plan.chunks * distance_count_), 0) {}

  template <typename Distance>
  void run(const ThreadPool& pool) {
    using Scratch = ThreadScratch<Distance>;
    std::vector<Scratch> scratch(size_t(plan_.threads));
    for_each_item(plan_, batch_, pool, scratch, [&](WorkItem& item, Scratch& own) { count(item, own); });
    parallel_for(pool, batch_.query_count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) place(q);
    });
    for_each_item(plan_, batch_, pool, scratch, [&](WorkItem& item, Scratch& own) { write(item, own); });
  }

 private:
  int64_t* row(int64_t query, int64_t chunk) {
    return ranks_.data() + (query * plan_.chunks + chunk) * distance_count_;
  }

  // Calls work(query of the block, tile, distances) for each tile and query. A code that the query's own filter
  // excludes has the distance distance_count_.
  template <typename Distance, typename Work>
  void for_each_tile_and_query(WorkItem& item, ThreadScratch<Distance>& scratch, Work work) {
    const auto filtered = [&](int64_t q, const HammingTile& tile, Distance* distances) {
      if (const uint8_t* const filter = item.filter_of(q))
        for (int64_t i = 0; i < tile.count; ++i)
          distances[i] = passes(filter, tile.position_of(i)) ? distances[i] : Distance(distance_count_);
      work(q, tile, distances);
    };
    item.for_each_tile_and_query(item.first_code, item.end_code, scratch.distances, filtered);
  }

  // The first pass: counts the codes of an item at each distance.
  template <typename Distance>
  void count(WorkItem& item, ThreadScratch<Distance>& scratch) {
    const int64_t counters = (distance_count_ + 1) * kCounterBanks;
    scratch.counts.assign(size_t(item.queries.count * counters), 0);
    for_each_tile_and_query(item, scratch, [&](int64_t q, const HammingTile& tile, const Distance* distances) {
      count_in_banks(distances, tile.count, scratch.counts.data() + q * counters);
    });
    for (int64_t q = 0; q < item.queries.count; ++q) {
      int64_t* const counts = row(item.first_query + q, item.chunk);
      for (int64_t i = 0; i < distance_count_ * kCounterBanks; ++i)
        counts[i / kCounterBanks] += scratch.counts[size_t(q * counters + i)];
    }
  }

  // Replaces the counts of a query by ranks, and writes its distances.
  void place(int64_t query) {
    int32_t* const distances = distances_ + query * k_;
    int64_t rank = 0;
    for (int64_t distance = 0; distance < distance_count_; ++distance) {
      const int64_t begin = std::min(rank, k_);
      for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) rank += std::exchange(row(query, chunk)[distance], rank);
      std::fill(distances + begin, distances + std::min(rank, k_), int32_t(distance));
    }
    const int64_t found = std::min(rank, k_);
    std::fill(distances + found, distances + k_, int32_t(distance_count_));
    std::fill(positions_ + query * k_ + found, positions_ + query * k_ + k_, int64_t(-1));
  }

  // The second pass: writes the positions of the codes of an item.
  template <typename Distance>
  void write(WorkItem& item, ThreadScratch<Distance>& scratch) {
    for_each_tile_and_query(item, scratch, [&](int64_t q, const HammingTile& tile, const Distance* distances) {
      int64_t* const ranks = row(item.first_query + q, item.chunk);
      int64_t* const positions = positions_ + (item.first_query + q) * k_;
      // Ranks grow with the distance.
      const auto near = Distance(std::lower_bound(ranks, ranks + distance_count_, k_) - ranks);
      scratch.kept.resize(size_t(tile.count) + 1);
      uint32_t* const kept = scratch.kept.data();
      int64_t kept_count = 0;
      for (int64_t i = 0; i < tile.count; ++i) {
        kept[kept_count] = uint32_t(i);
        kept_count += distances[i] < near;
      }
      int64_t dropped;
      for (int64_t i = 0; i < kept_count; ++i) {
        const int64_t rank = ranks[distances[kept[i]]]++;
        *(rank < k_ ? positions + rank : &dropped) = item.first_code + tile.position_of(kept[i]);
      }
    });
  }

  const HammingPlan& plan_;
  const HammingSearch& batch_;
  const int64_t k_, distance_count_;
  int32_t* const distances_;
  int64_t* const positions_;
  std::vector<int64_t> ranks_;  // [query, chunk, distance]: first the number of codes, then the rank of the next code
};

}  // namespace

void hamming_rank(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions, SimdLevel level,
                  const ThreadPool& pool) {
  const int64_t row_bytes = search.distance_count() * int64_t(sizeof(int64_t));
  // Assumes four chunks per thread, which is more than a plan usually makes.
  const int64_t batch_queries = std::max<int64_t>(kMaxCountBytes / (row_bytes * 4 * pool.threads), 1);
  for (int64_t first = 0; first < search.query_count; first += batch_queries) {
    const HammingSearch batch = search.slice(first, batch_queries);
    const HammingPlan plan(hamming_kernel(level, batch), batch, row_bytes, kMinChunkCodes, pool.threads);
    Ranking ranking(plan, batch, k, distances + first * k, positions + first * k);
    plan.with_distance_type([&](auto type) { ranking.run<decltype(type)>(pool); });
  }
}

}  // namespace hashengine
