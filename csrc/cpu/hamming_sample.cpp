// A candidate is taken to cost 20 cycles and a sampled code 3, of which only the ratio matters, and little. Where a
// sample should show h of the k nearest of N codes, it takes h N / k codes, and about k (1 + 4 / sqrt(h)) candidates
// pass a bound that lies four deviations above h. Their cost together is least at h = (13 k^2 / N)^(2/3).

#include "hamming_sample.h"

#include <cmath>

#include "hamming_blocks.h"

namespace hashengine {
namespace {

constexpr double kLeastHits = 8;     // so that a bound is rarely missed
constexpr int64_t kLeastShare = 64;  // a sample is at most this part of the codes
constexpr int64_t kSpotCodes = 512;  // that are sampled in one place

// A thread's memory.
struct Sample {
  std::vector<uint32_t> counts;  // [query, distance]
  std::vector<uint32_t> distances;
};

uint32_t bound_of(const uint32_t* counts, int64_t bins, double wanted) {
  uint64_t below = 0;
  for (int64_t distance = 0; distance < bins; ++distance) {
    below += counts[distance];
    if (double(below) >= wanted) return uint32_t(distance + 1);
  }
  return uint32_t(bins);
}

}  // namespace

std::vector<uint32_t> sample_bounds(const HammingSearch& search, int64_t k, SimdLevel level, const ThreadPool& pool) {
  const int64_t bins = 8 * search.code_bytes + 1;
  std::vector<uint32_t> bounds(size_t(search.query_count), uint32_t(bins));
  const double codes = double(search.code_count), share = double(k) / codes;
  const double hits = std::max(kLeastHits, std::pow(13 * double(k) * share, 2.0 / 3));
  const auto spots = int64_t(std::ceil(hits / share / double(kSpotCodes)));
  if (spots * kSpotCodes * kLeastShare > search.code_count) return bounds;
  const double expected = share * double(spots * kSpotCodes);
  const double wanted = expected + 4 * std::sqrt(expected) + 4;

  const HammingPlan plan(hamming_kernel(level, search), search, bins * int64_t(sizeof(uint32_t)), search.code_count,
                         pool.threads);
  for_each_item<Sample>(plan, search, pool, [&](HammingItem& item, Sample& own) {
    if (item.chunk > 0) return;  // of the longest databases, whose first two billion codes must do
    own.counts.assign(size_t(item.queries.count * bins), 0);
    own.distances.resize(item.tile_distances());
    const int64_t stride = (item.last_code / spots) & ~int64_t(63);
    for (int64_t spot = 0; spot < spots; ++spot)
      item.for_each_tile(spot * stride, spot * stride + kSpotCodes, [&](const HammingTile& tile) {
        for (int64_t q = 0; q < item.queries.count; ++q) {
          plan.kernel->measure(tile, item.queries, q, own.distances.data());
          uint32_t* const counts = own.counts.data() + q * bins;
          const uint8_t* const filter = item.filter_of(q);
          for (int64_t i = 0; i < tile.count; ++i)
            counts[own.distances[size_t(i)]] += filter == nullptr || passes(filter, tile.position_of(i));
        }
      });
    for (int64_t q = 0; q < item.queries.count; ++q)
      bounds[size_t(item.first_query + q)] = bound_of(own.counts.data() + q * bins, bins, wanted);
  });
  return bounds;
}

}  // namespace hashengine
