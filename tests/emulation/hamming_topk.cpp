// hamming_topk at any SIMD level through a C interface, with threads of its own instead of torch's pool.

#include "hashengine/hamming_topk.h"

#include <thread>
#include <vector>

extern "C" void hamming_topk(const uint8_t* queries, const uint8_t* codes, int64_t query_count, int64_t code_count,
                             int64_t code_bytes, int64_t k, int level, int threads, int32_t* distances,
                             int64_t* positions) {
  static int pool_threads;
  pool_threads = threads;
  const hashengine::ThreadPool pool = {
      [](int64_t count, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
        std::vector<std::thread> workers;
        for (int t = 0; t < pool_threads; ++t) {
          const int64_t begin = count * t / pool_threads, end = count * (t + 1) / pool_threads;
          if (begin < end) workers.emplace_back(body, context, begin, end);
        }
        for (std::thread& worker : workers) worker.join();
      },
      threads};
  hashengine::hamming_topk_cpu({queries, codes, query_count, code_count, code_bytes, k, distances, positions},
                               static_cast<hashengine::SimdLevel>(level), pool);
}
