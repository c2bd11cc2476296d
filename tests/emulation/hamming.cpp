// The Hamming searches at any SIMD level through a C interface, with threads of their own instead of torch's pool.

#include "hashengine/hamming.h"

#include <algorithm>
#include <thread>

namespace {

using namespace hashengine;

int pool_threads;

ThreadPool pool_of(int threads) {
  pool_threads = threads;
  return {[](int64_t count, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
            std::vector<std::thread> workers;
            for (int t = 0; t < pool_threads; ++t) {
              const int64_t begin = count * t / pool_threads, end = count * (t + 1) / pool_threads;
              if (begin < end) workers.emplace_back(body, context, begin, end);
            }
            for (std::thread& worker : workers) worker.join();
          },
          threads};
}

}  // namespace

extern "C" {
void hamming_topk(const HammingSearch* search, int level, int threads, int64_t k, int32_t* distances,
                  int64_t* positions) {
  hamming_topk_cpu(*search, k, distances, positions, SimdLevel(level), pool_of(threads));
}

// lims: [query_count + 1]; distances, positions: room for query_count * code_count.
void hamming_range(const HammingSearch* search, int level, int threads, int64_t radius, int64_t max_results,
                   int64_t* lims, int32_t* distances, int64_t* positions) {
  const HammingRangeResult result = hamming_range_cpu(*search, radius, max_results, SimdLevel(level), pool_of(threads));
  std::copy(result.lims.begin(), result.lims.end(), lims);
  std::copy(result.distances.begin(), result.distances.end(), distances);
  std::copy(result.positions.begin(), result.positions.end(), positions);
}

void hamming_count(const HammingSearch* search, int level, int threads, const HammingLabels* labels, int64_t* counts,
                   int64_t* relevant) {
  hamming_count_cpu(*search, labels, counts, relevant, SimdLevel(level), pool_of(threads));
}
}
