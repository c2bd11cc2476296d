// Size of the sample. Let h be the number of a query's k nearest codes that the sample is expected to contain. Then
// h N / k of the N codes are sampled. The bound is chosen so that about h + 4 sqrt(h) sampled codes are below it: four
// standard deviations more than expected. About k (1 + 4 / sqrt(h)) of all codes then become candidates. A candidate is
// assumed to cost 20 cycles and a sampled code 3; only the ratio matters, and only a little. The total cost is then
// least for h = (13 k^2 / N)^(2/3).

#include "cpu/hamming/sample.h"

#include <cmath>

#include "cpu/hamming/plan.h"

namespace hashengine {
namespace {

constexpr double kMinSampledNearest = 8;    // the smallest h; a smaller h would make too many bounds too tight
constexpr int64_t kMinCodesPerSample = 64;  // the sample contains at most one in 64 codes
constexpr int64_t kRunCodes = 512;  // per run; a sample consists of runs of consecutive codes, at equal intervals

template <typename Distance>
struct ThreadScratch {
  std::vector<uint32_t> counts;  // [query, distance]
  std::vector<Distance> distances;
};

// The smallest bound with at least `wanted` sampled codes below it; distance_count if there is none.
uint32_t bound_from_counts(const uint32_t* counts, int64_t distance_count, double wanted) {
  uint64_t below = 0;
  for (int64_t distance = 0; distance < distance_count; ++distance) {
    below += counts[distance];
    if (double(below) >= wanted) return uint32_t(distance + 1);
  }
  return uint32_t(distance_count);
}

}  // namespace

std::vector<uint32_t> sample_bounds(const HammingSearch& search, int64_t k, SimdLevel level, const ThreadPool& pool) {
  const int64_t distance_count = search.distance_count();
  std::vector<uint32_t> bounds(size_t(search.query_count), uint32_t(distance_count));
  const double codes = double(search.code_count), share = double(k) / codes;
  const double sampled_nearest = std::max(kMinSampledNearest, std::pow(13 * double(k) * share, 2.0 / 3));
  const auto runs = int64_t(std::ceil(sampled_nearest / share / double(kRunCodes)));
  if (runs * kRunCodes * kMinCodesPerSample > search.code_count) return bounds;
  const double expected = share * double(runs * kRunCodes);
  const double wanted = expected + 4 * std::sqrt(expected) + 4;

  const HammingPlan plan(hamming_kernel(level, search), search, distance_count * int64_t(sizeof(uint32_t)),
                         search.code_count, pool.threads);
  with_distance_type(search.code_bytes, [&](auto type) {
    using Distance = decltype(type);
    using Scratch = ThreadScratch<Distance>;
    for_each_item<Scratch>(plan, search, pool, [&](WorkItem& item, Scratch& scratch) {
      if (item.chunk > 0) return;  // a database of more than 2^31 codes has several chunks; the first suffices
      scratch.counts.assign(size_t(item.queries.count * distance_count), 0);
      const int64_t stride = (item.end_code / runs) & ~int64_t(63);
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t begin = run * stride, end = begin + kRunCodes;
        const auto count = [&](int64_t q, const HammingTile& tile, const Distance* distances) {
          uint32_t* const counts = scratch.counts.data() + q * distance_count;
          const uint8_t* const filter = item.filter_of(q);
          for (int64_t i = 0; i < tile.count; ++i)
            counts[distances[i]] += filter == nullptr || passes(filter, tile.position_of(i));
        };
        item.for_each_tile_and_query(begin, end, scratch.distances, count);
      }
      for (int64_t q = 0; q < item.queries.count; ++q)
        bounds[size_t(item.first_query + q)] =
            bound_from_counts(scratch.counts.data() + q * distance_count, distance_count, wanted);
    });
  });
  return bounds;
}

}  // namespace hashengine
