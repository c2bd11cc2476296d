// Counts codes by Hamming distance on the CPU.
//
// Idea. The distances of a tile from a query are computed first. They become values: a code that the query's filter
// excludes has the last value, and unless labels are numbers of a few classes, the values of relevant codes follow
// those of all others. Then a histogram of the values is made (histogram.h): of pairs of values where there are enough
// codes to repay its counters, otherwise in banks. With a few classes, the relevant codes are counted once more, on
// their own.

#include <mutex>

#include "cpu/hamming/histogram.h"
#include "cpu/hamming/plan.h"
#include "cpu/hamming/tile_labels.h"

namespace hashengine {
namespace {

constexpr int64_t kMinChunkCodes = 1 << 14;
constexpr int64_t kMinCodesPerPair = 16;  // codes for each counter of a pair; fewer do not repay adding up the counters
// Queries per block if pairs are counted. Of the 4 width^2 bytes of counters of a query, distances of random codes use
// about a quarter; those of a block stay in the second-level cache.
constexpr int64_t kPairedQueries = 32;

template <typename Value>
struct ThreadScratch {
  std::vector<Value> values;       // from one query to the codes of a tile
  std::vector<uint16_t> pairs;     // of one query
  std::vector<uint32_t> counts;    // [query, counter]
  std::vector<uint32_t> relevant;  // [query, value, bank], of relevant codes, if there are a few classes
  std::vector<int64_t> sums;       // [query, value]
  TileLabels labels;
};

}  // namespace

void hamming_count_cpu(const HammingSearch& search, const HammingLabels* labels, int64_t* counts, int64_t* relevant,
                       SimdLevel level, const ThreadPool& pool) {
  const int64_t distance_count = search.distance_count();
  std::fill(counts, counts + search.query_count * distance_count, 0);
  if (labels) std::fill(relevant, relevant + search.query_count * distance_count, 0);
  if (search.query_count == 0) return;

  const LabelPlanes planes(labels ? *labels : HammingLabels{}, labels ? search.query_count : 0, search.code_count);
  const bool has_classes = labels && planes.classes() > 0;
  const int64_t kinds = labels && !has_classes ? 2 : 1;
  const int64_t excluded = kinds * distance_count, width = excluded + 1;
  const HammingKernel& kernel = hamming_kernel(level, search);
  const bool has_pairs = width <= kMaxPairWidth && search.code_count >= kMinCodesPerPair * width * width;
  const int64_t query_counters = has_pairs ? width * width : width * kCounterBanks;
  const int64_t min_chunk_codes = has_pairs ? kMinCodesPerPair * width * width : kMinChunkCodes;
  const int64_t scratch_bytes = query_counters * int64_t(sizeof(uint32_t));
  const HammingPlan plan(kernel, search, has_pairs ? kThreadScratchBytes / kPairedQueries : scratch_bytes,
                         min_chunk_codes, pool.threads);

  std::mutex result_mutex;
  const auto add_item = [&](const WorkItem& item, const auto& scratch) {
    const std::lock_guard lock(result_mutex);  // items of other chunks add to the same counts
    for (int64_t q = 0; q < item.queries.count; ++q)
      for (int64_t distance = 0; distance < distance_count; ++distance) {
        const int64_t* const sums = scratch.sums.data() + q * width + distance;
        const int64_t at = (item.first_query + q) * distance_count + distance;
        counts[at] += kinds == 2 ? sums[0] + sums[distance_count] : sums[0];
        if (kinds == 2) relevant[at] += sums[distance_count];
        if (!has_classes) continue;
        const uint32_t* const banks = scratch.relevant.data() + (q * width + distance) * kCounterBanks;
        for (int64_t bank = 0; bank < kCounterBanks; ++bank) relevant[at] += banks[bank];
      }
  };
  const auto count_items = [&](auto type) {
    using Value = decltype(type);
    using Scratch = ThreadScratch<Value>;
    for_each_item<Scratch>(plan, search, pool, [&](WorkItem& item, Scratch& scratch) {
      scratch.counts.assign(size_t(item.queries.count * query_counters), 0);
      if (has_classes) scratch.relevant.assign(size_t(item.queries.count * width * kCounterBanks), 0);
      const auto count = [&](int64_t q, const HammingTile& tile, Value* values) {
        uint32_t* const counters = scratch.counts.data() + q * query_counters;
        const int64_t query = item.first_query + q;
        if (labels && q == 0) scratch.labels.set(planes, item.first_code, tile);
        if (kinds == 2) scratch.labels.add_relevance(planes, query, Value(distance_count), values);
        if (const uint8_t* const filter = item.filter_of(q))
          for (int64_t i = 0; i < tile.count; ++i)
            values[i] = passes(filter, tile.position_of(i)) ? values[i] : Value(excluded);
        if (has_classes) {
          uint32_t* const relevant_counters = scratch.relevant.data() + q * width * kCounterBanks;
          scratch.labels.count_class(planes.of_query(query, 0), values, relevant_counters);
        }
        if constexpr (sizeof(Value) == 1) {
          if (has_pairs) {
            const int64_t padded = round_up(tile.count, 8);
            std::fill(values + tile.count, values + padded, Value(excluded));
            scratch.pairs.resize(size_t(padded));
            return count_pairs(values, padded, uint16_t(width), scratch.pairs.data(), counters);
          }
        }
        count_in_banks(values, tile.count, counters);
      };
      item.for_each_tile_and_query(item.first_code, item.end_code, scratch.values, count);

      scratch.sums.assign(size_t(item.queries.count * width), 0);
      for (int64_t q = 0; q < item.queries.count; ++q) {
        const uint32_t* const counters = scratch.counts.data() + q * query_counters;
        int64_t* const sums = scratch.sums.data() + q * width;
        const int64_t columns = has_pairs ? width : kCounterBanks;
        for (int64_t value = 0; value < width; ++value)
          for (int64_t column = 0; column < columns; ++column) {
            sums[value] += counters[value * columns + column];
            if (has_pairs) sums[column] += counters[value * columns + column];
          }
      }
      add_item(item, scratch);
    });
  };
  // If there are labels and not a few classes, there are twice as many values as distances.
  if (width <= 1 << 8) return count_items(uint8_t{});
  if (width <= 1 << 16) return count_items(uint16_t{});
  count_items(uint32_t{});
}

}  // namespace hashengine
