// Exact Hamming top-k and range search on the CPU.
//
// Each query's selector knows, after every candidate, the distance that the next must stay below; a scan only has to
// compare a vector of distances with it, and over N codes in random order about k * (1 + ln(N / k)) pass. For a large k
// a sample of the tiles tells a bound to begin with, so that only a few k pass. A chunk's nearest come as a list in
// order, and the lists of a query's chunks are merged.

#include <cmath>

#include "hamming_blocks.h"
#include "hamming_rank.h"

namespace hashengine {
namespace {

constexpr int64_t kMinChunkCodes = 1 << 16;  // less is not worth a merge
constexpr int64_t kRankedShare = 8;          // of the codes; a longer ranking is made by counting

// The nearest of one chunk to one query, in order.
struct List {
  const int32_t* distances;
  const int64_t* positions;
  int64_t length;
};

// Merges lists, each in order, up to `limit` entries; lists stand in order of position, so the first wins a tie. Returns
// the number of entries.
int64_t merge(const std::vector<List>& lists, int64_t limit, int32_t* distances, int64_t* positions) {
  std::vector<int64_t> heads(lists.size(), 0);
  for (int64_t rank = 0; rank < limit; ++rank) {
    size_t best = lists.size();
    for (size_t i = 0; i < lists.size(); ++i) {
      if (heads[i] == lists[i].length) continue;
      if (best == lists.size() || lists[i].distances[heads[i]] < lists[best].distances[heads[best]]) best = i;
    }
    if (best == lists.size()) return rank;
    distances[rank] = lists[best].distances[heads[best]];
    positions[rank] = lists[best].positions[heads[best]++];
  }
  return limit;
}

// A thread's memory.
struct Selectors {
  std::vector<Selector> of;      // each query of the block
  std::vector<uint32_t> bounds;  // what they begin with
  std::vector<uint32_t> counts;
  std::vector<uint32_t> distances;
};

// For each query, from a sample of the chunk's tiles, a bound below which probably lie at least k codes of the chunk,
// and not many more; `bound` where a sample is not worth its time or shows too few.
void sample_bounds(HammingItem& item, const HammingPlan& plan, int64_t k, uint32_t bound, Selectors& own) {
  constexpr double kHits = 16;         // of the k nearest that a sample should show
  constexpr int64_t kLeastShare = 32;  // a sample is at most this part of the tiles
  own.bounds.assign(size_t(item.queries.count), bound);
  const int64_t codes = item.last_code - item.first_code, tile_codes = item.tile_codes();
  const int64_t sampled = int64_t(std::ceil(kHits * double(codes) / double(k * tile_codes)));
  if (4 * k > codes || sampled * kLeastShare * tile_codes > codes) return;
  const auto bins = size_t(item.bins());
  own.counts.assign(size_t(item.queries.count) * bins, 0);
  own.distances.resize(item.tile_distances());
  for (int64_t i = 0; i < sampled; ++i) {
    const int64_t first = item.first_code + codes / sampled * i / tile_codes * tile_codes;
    item.for_each_tile(first, first + tile_codes, [&](const HammingTile& tile) {
      for (int64_t q = 0; q < item.queries.count; ++q) {
        plan.kernel->measure(tile, item.queries, q, own.distances.data());
        uint32_t* const counts = own.counts.data() + size_t(q) * bins;
        for (int64_t code = 0; code < tile.count; ++code)
          counts[own.distances[size_t(code)]] += passes(item.filter_of(q), tile.position_of(code));
      }
    });
  }
  const double expected = double(k) * double(sampled * tile_codes) / double(codes);
  const double wanted = expected + 4 * std::sqrt(expected) + 4;
  for (size_t q = 0; q < own.bounds.size(); ++q) {
    uint64_t below = 0;
    for (uint32_t distance = 0; distance < bound; ++distance) {
      below += own.counts[q * bins + distance];
      if (double(below) < wanted) continue;
      own.bounds[q] = distance + 1;
      break;
    }
  }
}

// Leaves each query's nearest of the chunk, at most k and below the bound, settled in its selector.
void select(HammingItem& item, const HammingPlan& plan, Selectors& own, int64_t k, uint32_t bound) {
  const int64_t codes = item.last_code - item.first_code, wanted = std::min(k, codes);
  own.of.resize(size_t(plan.query_block));
  sample_bounds(item, plan, wanted, bound, own);
  for (bool again = true; again;) {
    for (size_t q = 0; q < own.bounds.size(); ++q)
      own.of[q].reset(wanted, codes, own.bounds[q], item.filter_of(int64_t(q)));
    item.for_each_tile([&](const HammingTile& tile) { plan.kernel->scan(tile, item.queries, own.of.data()); });
    again = false;
    for (size_t q = 0; q < own.bounds.size(); ++q)
      again |= own.of[q].settle() < wanted && own.bounds[q] < bound;
    if (again) own.bounds.assign(own.bounds.size(), bound);  // a sample led astray
  }
}

}  // namespace

void hamming_topk_cpu(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions, SimdLevel level,
                      const ThreadPool& pool) {
  if (search.query_count == 0) return;
  if (k > kMinRanked && k > search.code_count / kRankedShare)
    return hamming_rank(search, k, distances, positions, level, pool);
  const int64_t bits = 8 * search.code_bytes;
  const HammingPlan plan(search, Selector::bytes(bits, k, search.code_count), std::max(kMinChunkCodes, 4 * k), level,
                         pool.threads);
  // Of one chunk the list is the result; else every chunk's goes to scratch: [query, chunk, k].
  const bool direct = plan.chunks == 1;
  const int64_t numel = direct ? 0 : search.query_count * plan.chunks * k;
  std::unique_ptr<int32_t[]> scratch_distances(new int32_t[size_t(numel)]);
  std::unique_ptr<int64_t[]> scratch_positions(new int64_t[size_t(numel)]);
  int32_t* const list_distances = direct ? distances : scratch_distances.get();
  int64_t* const list_positions = direct ? positions : scratch_positions.get();
  std::vector<int64_t> lengths(size_t(search.query_count * plan.chunks));

  for_each_item<Selectors>(plan, search, pool, [&](HammingItem& item, Selectors& own) {
    select(item, plan, own, k, uint32_t(bits + 1));
    for (int64_t q = 0; q < item.queries.count; ++q) {
      const int64_t list = (item.first_query + q) * plan.chunks + item.chunk;
      lengths[size_t(list)] = own.of[size_t(q)].settle();
      own.of[size_t(q)].write(list_distances + list * k, list_positions + list * k, item.first_code);
    }
  });
  parallel_for(pool, search.query_count, ceil_div<int64_t>(1 << 16, k), [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) {
      int64_t found = lengths[size_t(q)];
      if (!direct) {
        std::vector<List> lists;
        for (int64_t list = q * plan.chunks; list < (q + 1) * plan.chunks; ++list)
          lists.push_back({list_distances + list * k, list_positions + list * k, lengths[size_t(list)]});
        found = merge(lists, k, distances + q * k, positions + q * k);
      }
      std::fill(distances + q * k + found, distances + (q + 1) * k, int32_t(bits + 1));
      std::fill(positions + q * k + found, positions + (q + 1) * k, int64_t(-1));
    }
  });
}

HammingRangeResult hamming_range_cpu(const HammingSearch& search, int64_t radius, int64_t max_results, SimdLevel level,
                                     const ThreadPool& pool) {
  constexpr int64_t kExpected = 1024;  // results a query; more take more memory
  struct Entries {
    std::vector<int32_t> distances;
    std::vector<int64_t> positions;
  };
  const int64_t per_query = Selector::bytes(radius, std::min(max_results, kExpected), search.code_count);
  const HammingPlan plan(search, per_query, kMinChunkCodes, level, pool.threads);
  std::vector<Entries> lists(size_t(search.query_count * plan.chunks));
  for_each_item<Selectors>(plan, search, pool, [&](HammingItem& item, Selectors& own) {
    select(item, plan, own, max_results, uint32_t(radius + 1));
    for (int64_t q = 0; q < item.queries.count; ++q) {
      Entries& list = lists[size_t((item.first_query + q) * plan.chunks + item.chunk)];
      const auto found = size_t(own.of[size_t(q)].settle());
      list.distances.resize(found);
      list.positions.resize(found);
      own.of[size_t(q)].write(list.distances.data(), list.positions.data(), item.first_code);
    }
  });

  HammingRangeResult result;
  result.lims.assign(size_t(search.query_count + 1), 0);
  for (size_t q = 0; q < size_t(search.query_count); ++q) {
    int64_t found = 0;
    for (size_t chunk = 0; chunk < size_t(plan.chunks); ++chunk)
      found += int64_t(lists[q * size_t(plan.chunks) + chunk].distances.size());
    result.lims[q + 1] = result.lims[q] + std::min(found, max_results);
  }
  result.distances.resize(size_t(result.lims.back()));
  result.positions.resize(size_t(result.lims.back()));
  parallel_for(pool, search.query_count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) {
      std::vector<List> parts;
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        const Entries& list = lists[size_t(q * plan.chunks + chunk)];
        parts.push_back({list.distances.data(), list.positions.data(), int64_t(list.distances.size())});
      }
      const int64_t at = result.lims[size_t(q)];
      merge(parts, result.lims[size_t(q) + 1] - at, result.distances.data() + at, result.positions.data() + at);
    }
  });
  return result;
}

}  // namespace hashengine
