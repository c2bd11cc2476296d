// The Hamming searches at any SIMD level, with threads of their own instead of torch's pool, behind one function of
// numbers and buffers, which pass through ctypes and through a pipe alike.

#include "hashengine/hamming.h"

#include <algorithm>
#include <thread>

#include "hamming_blocks.h"

namespace {

using namespace hashengine;

int64_t pool_threads;

ThreadPool pool_of(int64_t threads) {
  pool_threads = threads;
  return {[](int64_t count, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
            std::vector<std::thread> workers;
            for (int64_t t = 0; t < pool_threads; ++t) {
              const int64_t begin = count * t / pool_threads, end = count * (t + 1) / pool_threads;
              if (begin < end) workers.emplace_back(body, context, begin, end);
            }
            for (std::thread& worker : workers) worker.join();
          },
          int(threads)};
}

// How many of the codes that the level's block kernel offers to each query, within a radius, lie within it of the
// query's stand-in too: the kernel lays out the queries, and takes the distances that it offers from the stand-ins.
void count_offered(const HammingSearch& search, const uint8_t* stand_ins, int64_t radius, SimdLevel level,
                   int64_t* counts) {
  const HammingKernel& kernel = *hamming_block_kernel(level, search);
  ThreadMemory memory;
  uint8_t* const prepared = memory.reserve(kernel.block_queries * kernel.query_bytes(search.code_bytes), false);
  kernel.prepare_queries(search.queries, search.query_count, search.code_bytes, prepared);
  std::vector<Selector> selectors(size_t(kernel.block_queries));
  for (Selector& selector : selectors)
    selector.reset(HammingCandidates(search.code_bytes), search.code_count + 1, search.code_count, uint32_t(radius + 1),
                   nullptr, nullptr, 0);
  // Places of the block that no query takes find zeros.
  std::vector<uint8_t> rows(size_t(kernel.block_queries * search.code_bytes));
  std::copy_n(stand_ins, search.query_count * search.code_bytes, rows.begin());
  const HammingTile tile = {nullptr, search.codes, search.code_count, search.code_bytes, nullptr, 0};
  kernel.scan(tile, {prepared, rows.data(), search.query_count}, selectors.data());
  for (int64_t q = 0; q < search.query_count; ++q) counts[q] = selectors[size_t(q)].found();
  for (int64_t q = search.query_count; q < kernel.block_queries; ++q) counts[0] += selectors[size_t(q)].found();
}

}  // namespace

// numbers: function, level, threads, queries, codes, code_bytes, filter_stride, and two that are the function's own.
// buffers: queries, codes, filter, labels of the queries (or stand-ins for these) and of the codes, and up to three
// that the function fills.
extern "C" void hamming_call(const int64_t* numbers, void* const* buffers) {
  const auto in = [&](int i) { return static_cast<const uint8_t*>(buffers[i]); };
  const auto out = [&](int i) { return static_cast<int64_t*>(buffers[i]); };
  const HammingSearch search = {in(0), in(1), numbers[3], numbers[4], numbers[5], in(2), numbers[6]};
  const auto level = SimdLevel(numbers[1]);
  const ThreadPool pool = pool_of(numbers[2]);
  switch (numbers[0]) {
    case 0:  // k; distances, positions
      return hamming_topk_cpu(search, numbers[7], static_cast<int32_t*>(buffers[5]), out(6), level, pool);
    case 1: {  // radius, max_results; lims, then distances and positions with room for every pair
      const HammingRangeResult result = hamming_range_cpu(search, numbers[7], numbers[8], level, pool);
      std::copy(result.lims.begin(), result.lims.end(), out(5));
      std::copy_n(result.distances.get(), result.count(), static_cast<int32_t*>(buffers[6]));
      std::copy_n(result.positions.get(), result.count(), out(7));
      return;
    }
    case 2:  // radius; counts
      return count_offered(search, in(3), numbers[7], level, out(5));
    default: {  // words of a row of labels, 0 without them, and whether any that is shared counts; counts, relevant
      const auto* const rows = reinterpret_cast<uint64_t* const*>(buffers);
      const HammingLabels labels = {rows[3], rows[4], numbers[7], numbers[8] != 0};
      return hamming_count_cpu(search, labels.words ? &labels : nullptr, out(5), out(6), level, pool);
    }
  }
}
