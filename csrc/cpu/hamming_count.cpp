// Counts of Hamming distances on the CPU, and rankings made from them.
//
// A distance costs its share of a tile's measuring and one increment. Neighbouring codes often have one distance, and
// an increment would wait for the one before it: four counters a distance take turns.

#include <mutex>
#include <utility>

#include "hamming_blocks.h"
#include "hamming_rank.h"

namespace hashengine {
namespace {

constexpr int64_t kMinChunkCodes = 1 << 14;
constexpr int64_t kTurns = 4;
constexpr int64_t kHistogramBytes = int64_t(32) << 20;

bool is_relevant(const HammingLabels& labels, const uint64_t* a, const uint64_t* b) {
  if (!labels.any) return std::equal(a, a + labels.words, b);
  for (int64_t w = 0; w < labels.words; ++w)
    if (a[w] & b[w]) return true;
  return false;
}

// The distance becomes twice itself, and one more where the code is relevant.
void add_relevance(const HammingLabels& labels, int64_t query, int64_t first_code, const HammingTile& tile,
                   uint32_t* distances) {
  const uint64_t* const own = labels.queries + query * labels.words;
  const uint64_t* const codes = labels.codes + first_code * labels.words;
  if (labels.words == 1 && !tile.positions) {  // the usual case, in a loop that the compiler vectorises
    const uint64_t label = *own, any = labels.any ? ~uint64_t(0) : 0;
    const uint64_t* const of_tile = codes + tile.position;
    for (int64_t i = 0; i < tile.count; ++i) {
      const uint64_t is_equal = of_tile[i] == label, shares = (of_tile[i] & label) != 0;
      distances[i] = 2 * distances[i] + uint32_t((is_equal & ~any) | (shares & any));
    }
    return;
  }
  for (int64_t i = 0; i < tile.count; ++i)
    distances[i] = 2 * distances[i] + is_relevant(labels, own, codes + tile.position_of(i) * labels.words);
}

// A thread's memory.
struct Counters {
  std::vector<uint32_t> distances;  // of a tile
  std::vector<uint32_t> counts;     // [query, distance, relevant or not, turn]
};

// visit(query, tile, distances) for each query and tile of the item.
template <typename Visit>
void for_each_measure(HammingItem& item, const HammingKernel& kernel, std::vector<uint32_t>& distances, Visit visit) {
  distances.resize(item.tile_distances());
  item.for_each_tile([&](const HammingTile& tile) {
    for (int64_t q = 0; q < item.queries.count; ++q) {
      kernel.measure(tile, item.queries, q, distances.data());
      visit(q, tile, distances.data());
    }
  });
}

// visit(query, position in the chunk, distance) for each pair that counts, codes in order.
template <typename Visit>
void for_each_distance(HammingItem& item, const HammingKernel& kernel, std::vector<uint32_t>& memory, Visit visit) {
  for_each_measure(item, kernel, memory, [&](int64_t q, const HammingTile& tile, const uint32_t* distances) {
    const uint8_t* const filter = item.filter_of(q);
    for (int64_t i = 0; i < tile.count; ++i) {
      const uint32_t position = tile.position_of(i);
      if (passes(filter, position)) visit(q, position, distances[i]);
    }
  });
}

}  // namespace

void hamming_count_cpu(const HammingSearch& search, const HammingLabels* labels, int64_t* counts, int64_t* relevant,
                       SimdLevel level, const ThreadPool& pool) {
  const int64_t bins = 8 * search.code_bytes + 1, kinds = labels ? 2 : 1, stride = bins * kinds * kTurns;
  std::fill(counts, counts + search.query_count * bins, 0);
  if (labels) std::fill(relevant, relevant + search.query_count * bins, 0);
  if (search.query_count == 0) return;
  const HammingPlan plan(hamming_kernel(level, search), search, stride * int64_t(sizeof(uint32_t)), kMinChunkCodes,
                         pool.threads);
  std::mutex adding;
  for_each_item<Counters>(plan, search, pool, [&](HammingItem& item, Counters& own) {
    own.counts.assign(size_t(item.queries.count * stride), 0);
    for_each_measure(item, *plan.kernel, own.distances, [&](int64_t q, const HammingTile& tile, uint32_t* distances) {
      uint32_t* const counters = own.counts.data() + q * stride;
      if (labels) add_relevance(*labels, item.first_query + q, item.first_code, tile, distances);
      if (const uint8_t* const filter = item.filter_of(q)) {
        for (int64_t i = 0; i < tile.count; ++i)
          counters[distances[i] * kTurns + i % kTurns] += passes(filter, tile.position_of(i));
      } else {
        for (int64_t i = 0; i < tile.count; ++i) ++counters[distances[i] * kTurns + i % kTurns];
      }
    });
    const std::lock_guard lock(adding);  // items of other chunks have the same queries
    for (int64_t row = 0; row < item.queries.count * bins; ++row) {
      int64_t sums[2] = {0, 0};
      for (int64_t i = 0; i < kinds * kTurns; ++i) sums[i / kTurns] += own.counts[size_t(row * kinds * kTurns + i)];
      counts[item.first_query * bins + row] += sums[0] + sums[1];
      if (labels) relevant[item.first_query * bins + row] += sums[1];
    }
  });
}

void hamming_rank(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions, SimdLevel level,
                  const ThreadPool& pool) {
  const int64_t bins = 8 * search.code_bytes + 1, row_bytes = bins * int64_t(sizeof(int64_t));
  const int64_t together = std::max<int64_t>(kHistogramBytes / (row_bytes * 4 * pool.threads), 1);
  for (int64_t first = 0; first < search.query_count; first += together) {
    HammingSearch part = search;
    part.query_count = std::min(together, search.query_count - first);
    part.queries += first * search.code_bytes;
    if (part.filter) part.filter += first * search.filter_stride;
    const HammingPlan plan(hamming_kernel(level, part), part, row_bytes, kMinChunkCodes, pool.threads);
    // First how many of a chunk's codes stand at each distance, then the rank of the next of them.
    std::vector<int64_t> ranks(size_t(part.query_count * plan.chunks * bins), 0);
    const auto row = [&](const HammingItem& item, int64_t q) {
      return ranks.data() + ((item.first_query + q) * plan.chunks + item.chunk) * bins;
    };
    for_each_item<std::vector<uint32_t>>(plan, part, pool, [&](HammingItem& item, std::vector<uint32_t>& memory) {
      for_each_distance(item, *plan.kernel, memory,
                        [&](int64_t q, uint32_t, uint32_t distance) { ++row(item, q)[distance]; });
    });
    for (int64_t q = 0; q < part.query_count; ++q) {
      int64_t rank = 0;
      for (int64_t distance = 0; distance < bins; ++distance)
        for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
          int64_t& entry = ranks[size_t((q * plan.chunks + chunk) * bins + distance)];
          rank += std::exchange(entry, rank);
        }
      for (; rank < k; ++rank) {
        distances[(first + q) * k + rank] = int32_t(bins);
        positions[(first + q) * k + rank] = -1;
      }
    }
    for_each_item<std::vector<uint32_t>>(plan, part, pool, [&](HammingItem& item, std::vector<uint32_t>& memory) {
      for_each_distance(item, *plan.kernel, memory, [&](int64_t q, uint32_t at, uint32_t distance) {
        const int64_t rank = row(item, q)[distance]++;
        if (rank >= k) return;
        distances[(first + item.first_query + q) * k + rank] = int32_t(distance);
        positions[(first + item.first_query + q) * k + rank] = item.first_code + at;
      });
    });
  }
}

}  // namespace hashengine
