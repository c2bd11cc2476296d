// The one way the CPU kernels use several cores. The caller lends its thread pool (the binding lends torch's), so that
// no second OpenMP runtime is ever loaded beside torch's.
#pragma once

#include <algorithm>
#include <cstdint>

namespace hashengine {

struct ThreadPool {
  // Calls body(context, begin, end) on disjoint ranges that cover [0, count), at least `grain` long each.
  void (*run)(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
  int threads;
};

template <typename Body>
void parallel_for(const ThreadPool& pool, int64_t count, int64_t grain, Body body) {
  if (count <= 0) return;
  pool.run(
      count, std::max(grain, (count + pool.threads - 1) / pool.threads),  // no more ranges than threads
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

}  // namespace hashengine
