// Ranking of codes by a counting sort. The first pass over the codes stores the distances from all queries of a batch,
// and counts the codes of each chunk at each distance. Prefix sums of these counts give, for each chunk and distance,
// the rank of the chunk's first code at that distance. The second pass, over the stored distances, writes the position
// of each code to the entry of its rank, if the rank is less than k. The distances of the entries follow from the
// prefix sums.
//
// Memory. One to four bytes per code and query of a batch. A batch has as many queries as kDistanceBytes have room for,
// which stay in the caches between the passes. For more codes it has kWantedQueries, which share the work of preparing
// tiles, if that takes at most a quarter of the memory of all results; otherwise fewer, but at least one.

#include "cpu/hamming/ranking.h"

#include <utility>

#include "cpu/hamming/histogram.h"
#include "cpu/hamming/plan.h"

namespace hashengine {
namespace {

constexpr int64_t kMinChunkCodes = 1 << 14;
constexpr int64_t kMaxCountBytes = int64_t(32) << 20;  // for the counts of all queries that are ranked together
constexpr int64_t kDistanceBytes = int64_t(8) << 20;   // for the distances of all queries that are ranked together
constexpr int64_t kWantedQueries = 8;
constexpr int64_t kBlockCodes = 2048;     // codes that the second pass reads at a time
constexpr int64_t kPrefetchedRanks = 16;  // the second pass requests the cache line that many entries ahead

template <typename Distance>
struct ThreadScratch {
  std::vector<Distance> unused;  // room for a query that does not exist
  std::vector<uint32_t> counts;  // [query, distance, bank]
};

// One batch of queries.
template <typename Distance>
class Ranking {
 public:
  Ranking(const HammingPlan& plan, const HammingSearch& batch, int64_t k, int32_t* distances, int64_t* positions,
          PageBuffer& memory)
      : plan_(plan),
        batch_(batch),
        k_(k),
        distance_count_(batch.distance_count()),
        room_(round_up(plan.chunk_codes, kDistancesMultiple) + kDistancesMultiple),
        distances_(distances),
        positions_(positions),
        stored_counts_(size_t(plan.chunks)),
        ranks_(size_t(batch.query_count * plan.chunks * distance_count_), 0) {
    const int64_t bytes = batch.query_count * plan.chunks * room_ * int64_t(sizeof(Distance));
    stored_ = reinterpret_cast<Distance*>(memory.reserve(bytes, true));
    if (shares_filter()) passing_.resize(size_t(plan.chunks * room_));
  }

  void run(const ThreadPool& pool) {
    std::vector<ThreadScratch<Distance>> scratch(size_t(plan_.threads));
    for_each_item(plan_, batch_, pool, scratch, [&](auto& item, auto& own) { count(item, own); });
    parallel_for(pool, batch_.query_count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) place(q);
    });
    const int64_t rows = batch_.query_count * plan_.chunks;
    parallel_for(pool, rows, plan_.threads == 1 ? rows : 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) write(row / plan_.chunks, row % plan_.chunks);
    });
  }

 private:
  int64_t* ranks(int64_t query, int64_t chunk) {
    return ranks_.data() + (query * plan_.chunks + chunk) * distance_count_;
  }
  Distance* stored(int64_t query, int64_t chunk) { return stored_ + (query * plan_.chunks + chunk) * room_; }
  bool shares_filter() const { return batch_.filter && batch_.filter_stride == 0; }

  // The first pass: stores the distances of an item, and counts its codes at each distance. A code that the query's own
  // filter excludes gets the distance distance_count_. A code that the filter of all queries excludes is not stored.
  void count(WorkItem& item, ThreadScratch<Distance>& scratch) {
    const int64_t counters = (distance_count_ + 1) * kCounterBanks;
    scratch.counts.assign(size_t(item.queries.count * counters), 0);
    scratch.unused.resize(size_t(item.tile_room()));
    int64_t begin = 0;  // of the tile, among the stored codes of the chunk
    item.for_each_tile([&](const HammingTile& tile) {
      for (int64_t q = 0; q < item.queries.count; q += 2) {
        const bool is_pair = q + 1 < item.queries.count;
        Distance* const first = stored(item.first_query + q, item.chunk) + begin;
        Distance* const second = is_pair ? stored(item.first_query + q + 1, item.chunk) + begin : scratch.unused.data();
        item.compute_distances(tile, q, first, second);
        for (int64_t i = 0; i < 1 + is_pair; ++i) {
          Distance* const distances = i == 0 ? first : second;
          exclude(item.filter_of(q + i), tile, distances);
          count_in_banks(distances, tile.count, scratch.counts.data() + (q + i) * counters);
        }
      }
      if (shares_filter() && item.first_query == 0)
        std::copy_n(tile.positions, tile.count, passing_.data() + item.chunk * room_ + begin);
      begin += tile.count;
    });
    if (item.first_query == 0) stored_counts_[size_t(item.chunk)] = begin;
    for (int64_t q = 0; q < item.queries.count; ++q) {
      int64_t* const counts = ranks(item.first_query + q, item.chunk);
      for (int64_t i = 0; i < distance_count_ * kCounterBanks; ++i)
        counts[i / kCounterBanks] += scratch.counts[size_t(q * counters + i)];
    }
  }

  void exclude(const uint8_t* filter, const HammingTile& tile, Distance* distances) const {
    if (filter == nullptr) return;
    for (int64_t i = 0; i < tile.count; ++i)
      distances[i] = passes(filter, tile.position_of(i)) ? distances[i] : Distance(distance_count_);
  }

  // Replaces the counts of a query by ranks, and writes its distances.
  void place(int64_t query) {
    int32_t* const distances = distances_ + query * k_;
    int64_t rank = 0;
    for (int64_t distance = 0; distance < distance_count_; ++distance) {
      const int64_t begin = std::min(rank, k_);
      for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) rank += std::exchange(ranks(query, chunk)[distance], rank);
      std::fill(distances + begin, distances + std::min(rank, k_), int32_t(distance));
    }
    const int64_t found = std::min(rank, k_);
    std::fill(distances + found, distances + k_, int32_t(distance_count_));
    std::fill(positions_ + query * k_ + found, positions_ + query * k_ + k_, int64_t(-1));
  }

  // The second pass: writes the positions of the codes of a chunk.
  void write(int64_t query, int64_t chunk) {
    int64_t* const next = ranks(query, chunk);
    int64_t* const positions = positions_ + query * k_;
    const Distance* const distances = stored(query, chunk);
    const uint32_t* const passing = shares_filter() ? passing_.data() + chunk * room_ : nullptr;
    const int64_t first_code = chunk * plan_.chunk_codes, count = stored_counts_[size_t(chunk)];
    // Ranks grow with the distance: from `near` on, none is below k.
    const auto near = Distance(std::lower_bound(next, next + distance_count_, k_) - next);
    const bool keeps_all = near == distance_count_ && (batch_.filter == nullptr || shares_filter());
    int64_t dropped;
    const auto write_code = [&](int64_t code) {
      const int64_t rank = next[distances[code]]++;
      int64_t* const entry = rank < k_ ? positions + rank : &dropped;
      *entry = first_code + (passing ? int64_t(passing[code]) : code);
      return entry;
    };
    for (int64_t begin = 0; begin < count; begin += kBlockCodes) {
      const int64_t end = std::min(begin + kBlockCodes, count);
      if (keeps_all) {
        for (int64_t code = begin; code < end; ++code) __builtin_prefetch(write_code(code) + kPrefetchedRanks, 1);
        continue;
      }
      uint8_t is_near[kBlockCodes + 8];
      for (int64_t i = 0; i < end - begin; ++i) is_near[i] = distances[begin + i] < near;
      std::fill_n(is_near + (end - begin), 8, uint8_t(0));
      uint32_t kept[kBlockCodes + 8];
      int64_t kept_count = 0;
      for (int64_t i = 0; i < end - begin; i += 8) {
        uint64_t eight;
        std::memcpy(&eight, is_near + i, 8);
#pragma GCC unroll 8
        for (int64_t j = 0; j < 8; ++j) {
          kept[kept_count] = uint32_t(begin + i + j);
          kept_count += int64_t(eight >> 8 * j & 1);
        }
      }
      for (int64_t i = 0; i < kept_count; ++i) write_code(kept[i]);
    }
  }

  const HammingPlan& plan_;
  const HammingSearch& batch_;
  const int64_t k_, distance_count_;
  const int64_t room_;  // the stored distances of a chunk from one query
  int32_t* const distances_;
  int64_t* const positions_;
  Distance* stored_;                    // [query, chunk, room_]
  std::vector<uint32_t> passing_;       // [chunk, room_]: the positions of the stored codes, if queries share a filter
  std::vector<int64_t> stored_counts_;  // of each chunk
  std::vector<int64_t> ranks_;  // [query, chunk, distance]: first the number of codes, then the rank of the next code
};

}  // namespace

void hamming_rank(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions, SimdLevel level,
                  const ThreadPool& pool) {
  with_distance_type(search.code_bytes, [&](auto type) {
    using Distance = decltype(type);
    const int64_t row_bytes = search.distance_count() * int64_t(sizeof(int64_t));
    const int64_t result_bytes = search.query_count * k * int64_t(sizeof(*distances) + sizeof(*positions));
    const int64_t stored_bytes = search.code_count * int64_t(sizeof(Distance));  // per query
    const int64_t wanted = std::min(kWantedQueries, result_bytes / 4 / stored_bytes);
    // Assumes four chunks per thread, which is more than a plan usually makes.
    const int64_t most = kMaxCountBytes / (row_bytes * 4 * pool.threads);
    const int64_t max_queries = std::max<int64_t>(std::min(std::max(kDistanceBytes / stored_bytes, wanted), most), 1);
    // Batches are about equal, because the last queries of a small batch would not be computed in pairs.
    const int64_t batches = std::max<int64_t>(ceil_div(search.query_count, max_queries), 1);
    const int64_t batch_queries = std::min(round_up(ceil_div(search.query_count, batches), 2), max_queries);
    PageBuffer memory;
    for (int64_t first = 0; first < search.query_count; first += batch_queries) {
      const HammingSearch batch = search.slice(first, batch_queries);
      const HammingPlan plan(hamming_kernel(level, batch), batch, row_bytes, kMinChunkCodes, pool.threads);
      Ranking<Distance>(plan, batch, k, distances + first * k, positions + first * k, memory).run(pool);
    }
  });
}

}  // namespace hashengine
