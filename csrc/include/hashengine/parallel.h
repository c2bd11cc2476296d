// The CPU kernels run on the threads of a pool that the caller passes. The binding passes torch's pool, so the kernels
// need no OpenMP runtime of their own.
#pragma once

#include <algorithm>
#include <cstdint>

namespace hashengine {

struct ThreadPool {
  // Calls body(context, begin, end) on disjoint ranges that cover [0, count). `grain` is a hint: a range much smaller
  // than `grain` is not worth a thread.
  void (*run)(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
  int threads;
};

// Calls body(begin, end) on disjoint ranges that cover [0, count): at most one range per thread.
template <typename Body>
void parallel_for(const ThreadPool& pool, int64_t count, int64_t grain, Body body) {
  if (count <= 0) return;
  pool.run(
      count, std::max(grain, (count + pool.threads - 1) / pool.threads),
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

}  // namespace hashengine
