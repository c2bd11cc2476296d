// One C function that runs the Hamming searches at any SIMD level. Its arguments are numbers and buffers, so it can be
// called through ctypes or through a pipe (hamming_worker.cpp). Every parallel loop starts its own threads,
// because this code is built without torch and therefore has no thread pool.

#include <algorithm>
#include <thread>

#include "cpu/hamming/plan.h"
#include "hashengine/hamming.h"

namespace {

using namespace hashengine;

int64_t pool_threads;

ThreadPool make_pool(int64_t threads) {
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

// Reveals false hits of the level's bit-sliced kernel. In a search, the kernel computes the exact distance of each hit,
// and the selector rejects a hit that is not below the bound, so false hits are never seen. Here the kernel finds hits
// with tables made from search.queries, but computes their exact distances from `stand_ins`. counts[q] becomes the
// number of hits of query q whose distance from the stand-in of q is at most `radius`. LevelLibrary.pushed chooses
// the stand-ins.
void count_pushed(const HammingSearch& search, const uint8_t* stand_ins, int64_t radius, SimdLevel level,
                  int64_t* counts) {
  const HammingKernel& kernel = *bitsliced_hamming_kernels(level, search)[0];
  PageBuffer buffer;
  uint8_t* const prepared = buffer.reserve(kernel.block_queries * kernel.query_bytes(search.code_bytes), false);
  kernel.prepare_queries(search.queries, search.query_count, search.code_bytes, prepared);
  std::vector<Selector> selectors(size_t(kernel.block_queries));
  for (Selector& selector : selectors)
    selector.reset(KeyFormat(search.code_bytes), search.code_count + 1, search.code_count, uint32_t(radius + 1),
                   nullptr, nullptr, 0);
  // A block has room for more queries than there are. The unused places get zero codes as stand-ins, and any hit that
  // the kernel wrongly passes to their selectors is counted in counts[0].
  std::vector<uint8_t> block(size_t(kernel.block_queries * search.code_bytes));
  std::copy_n(stand_ins, search.query_count * search.code_bytes, block.begin());
  const HammingTile tile = {nullptr, search.codes, search.code_count, search.code_bytes, nullptr, 0};
  kernel.scan(tile, {prepared, block.data(), search.query_count}, selectors.data());
  for (int64_t q = 0; q < search.query_count; ++q) counts[q] = selectors[size_t(q)].found();
  for (int64_t q = search.query_count; q < kernel.block_queries; ++q) counts[0] += selectors[size_t(q)].found();
}

}  // namespace

// numbers: function, level, threads, query_count, code_count, code_bytes, filter_stride, and two arguments of the
// function. buffers: queries, codes, filter, labels of the queries (or their stand-ins), labels of the codes, and up to
// three outputs.
extern "C" void hamming_call(const int64_t* numbers, void* const* buffers) {
  const auto in = [&](int i) { return static_cast<const uint8_t*>(buffers[i]); };
  const auto out = [&](int i) { return static_cast<int64_t*>(buffers[i]); };
  const HammingSearch search = {in(0), in(1), numbers[3], numbers[4], numbers[5], in(2), numbers[6]};
  const auto level = SimdLevel(numbers[1]);
  const ThreadPool pool = make_pool(numbers[2]);
  switch (numbers[0]) {
    case 0:  // arguments: k; outputs: distances, positions
      return hamming_topk_cpu(search, numbers[7], static_cast<int32_t*>(buffers[5]), out(6), level, pool);
    case 1: {  // arguments: radius, max_results; outputs: lims, distances, positions (with room for all pairs)
      const HammingRangeResult result = hamming_range_cpu(search, numbers[7], numbers[8], level, pool);
      std::copy(result.lims.begin(), result.lims.end(), out(5));
      std::copy_n(result.distances.get(), result.count(), static_cast<int32_t*>(buffers[6]));
      std::copy_n(result.positions.get(), result.count(), out(7));
      return;
    }
    case 2:  // arguments: radius; outputs: counts
      return count_pushed(search, in(3), numbers[7], level, out(5));
    default: {  // arguments: words per label (0: no labels), whether one shared bit makes a code relevant; outputs:
                // counts, relevant
      const auto* const rows = reinterpret_cast<uint64_t* const*>(buffers);
      const HammingLabels labels = {rows[3], rows[4], numbers[7], numbers[8] != 0};
      return hamming_count_cpu(search, labels.words ? &labels : nullptr, out(5), out(6), level, pool);
    }
  }
}
