// Counts codes by Hamming distance on the CPU.
//
// Idea. The distances of a tile are computed first. Then one counter is incremented for each pair of a query and a
// code. Neighbouring codes often have the same distance, and two increments of the same counter in a row are slow,
// because the second must wait for the store of the first. Therefore each distance has kCounterBanks counters,
// which consecutive codes use in turn.

#include <mutex>

#include "cpu/hamming/plan.h"

namespace hashengine {
namespace {

constexpr int64_t kMinChunkCodes = 1 << 14;
constexpr int64_t kCounterBanks = 4;

bool is_relevant(const HammingLabels& labels, const uint64_t* a, const uint64_t* b) {
  if (!labels.any) return std::equal(a, a + labels.words, b);
  for (int64_t w = 0; w < labels.words; ++w)
    if (a[w] & b[w]) return true;
  return false;
}

// Replaces each distance d by 2 d, or by 2 d + 1 if the code is relevant.
void add_relevance(const HammingLabels& labels, int64_t query, int64_t first_code, const HammingTile& tile,
                   uint32_t* distances) {
  const uint64_t* const query_label = labels.queries + query * labels.words;
  const uint64_t* const code_labels = labels.codes + first_code * labels.words;
  if (labels.words == 1 && !tile.positions) {  // the usual case, in a loop that the compiler vectorises
    const uint64_t label = *query_label, any = labels.any ? ~uint64_t(0) : 0;
    const uint64_t* const tile_labels = code_labels + tile.first_position;
    for (int64_t i = 0; i < tile.count; ++i) {
      const uint64_t is_equal = tile_labels[i] == label, shares = (tile_labels[i] & label) != 0;
      distances[i] = 2 * distances[i] + uint32_t((is_equal & ~any) | (shares & any));
    }
    return;
  }
  for (int64_t i = 0; i < tile.count; ++i)
    distances[i] =
        2 * distances[i] + is_relevant(labels, query_label, code_labels + tile.position_of(i) * labels.words);
}

struct ThreadScratch {
  std::vector<uint32_t> distances;  // from one query to the codes of a tile
  std::vector<uint32_t> counts;     // [query, distance, relevance if there are labels, bank]
};

}  // namespace

void hamming_count_cpu(const HammingSearch& search, const HammingLabels* labels, int64_t* counts, int64_t* relevant,
                       SimdLevel level, const ThreadPool& pool) {
  const int64_t distance_count = search.distance_count(), kinds = labels ? 2 : 1;
  const int64_t query_counters = distance_count * kinds * kCounterBanks;
  std::fill(counts, counts + search.query_count * distance_count, 0);
  if (labels) std::fill(relevant, relevant + search.query_count * distance_count, 0);
  if (search.query_count == 0) return;
  const HammingPlan plan(hamming_kernel(level, search), search, query_counters * int64_t(sizeof(uint32_t)),
                         kMinChunkCodes, pool.threads);
  std::mutex result_mutex;
  for_each_item<ThreadScratch>(plan, search, pool, [&](WorkItem& item, ThreadScratch& scratch) {
    scratch.counts.assign(size_t(item.queries.count * query_counters), 0);
    item.for_each_tile_and_query(item.first_code, item.end_code, scratch.distances,
                                 [&](int64_t q, const HammingTile& tile, uint32_t* distances) {
                                   uint32_t* const counters = scratch.counts.data() + q * query_counters;
                                   if (labels)
                                     add_relevance(*labels, item.first_query + q, item.first_code, tile, distances);
                                   if (const uint8_t* const filter = item.filter_of(q)) {
                                     for (int64_t i = 0; i < tile.count; ++i)
                                       counters[distances[i] * kCounterBanks + i % kCounterBanks] +=
                                           passes(filter, tile.position_of(i));
                                   } else {
                                     for (int64_t i = 0; i < tile.count; ++i)
                                       ++counters[distances[i] * kCounterBanks + i % kCounterBanks];
                                   }
                                 });
    const std::lock_guard lock(result_mutex);  // items of other chunks add to the same counts
    for (int64_t row = 0; row < item.queries.count * distance_count; ++row) {
      int64_t sums[2] = {0, 0};
      for (int64_t i = 0; i < kinds * kCounterBanks; ++i)
        sums[i / kCounterBanks] += scratch.counts[size_t(row * kinds * kCounterBanks + i)];
      counts[item.first_query * distance_count + row] += sums[0] + sums[1];
      if (labels) relevant[item.first_query * distance_count + row] += sums[1];
    }
  });
}

}  // namespace hashengine
