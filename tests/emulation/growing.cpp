// Searches beside a writer, for ThreadSanitizer: readers search the codes of a state, with several threads each, while
// a writer appends behind them into the same memory and publishes the next state, as hashengine/index/_state.py does.
//
//   growing <level>          prints "same" where every answer was that of the definition
//   growing <level> early    publishes codes before it has written them, which the sanitizer must notice

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "hashengine/hamming.h"

using namespace hashengine;

namespace {

constexpr int64_t kBytes = 16, kQueries = 2, kNearest = 50, kFirst = 40000, kLast = 85000, kBatch = 3000;
constexpr int64_t kMany = 150;  // queries that AVX2 searches bit-sliced
constexpr int kReaders = 2, kThreads = 2;

struct State {
  std::shared_ptr<uint8_t[]> memory;
  int64_t count;
};

// Few values, so that most distances are ties; every thread can tell what must stand where.
uint8_t byte_of(int64_t i) { return uint8_t((uint64_t(i) * 0x9E3779B97F4A7C15u) >> 56) & 0x31; }

void run(int64_t count, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> workers;
  for (int64_t t = 0; t < kThreads; ++t) {
    const int64_t begin = count * t / kThreads, end = count * (t + 1) / kThreads;
    if (begin < end) workers.emplace_back(body, context, begin, end);
  }
  for (std::thread& worker : workers) worker.join();
}

// Whether the searches of a state give what the definition does.
bool is_right(const State& state, SimdLevel level) {
  std::vector<uint8_t> queries(size_t(kQueries * kBytes));
  for (size_t i = 0; i < queries.size(); ++i) queries[i] = byte_of(int64_t(i) * 7 + state.count);
  const HammingSearch search{queries.data(), state.memory.get(), kQueries, state.count, kBytes, nullptr, 0};
  const ThreadPool pool{run, kThreads};
  const int64_t bins = 8 * kBytes + 1;
  std::vector<int32_t> distances(size_t(kQueries * kNearest));
  std::vector<int64_t> positions(distances.size()), counts(size_t(kQueries * bins));
  hamming_topk_cpu(search, kNearest, distances.data(), positions.data(), level, pool);
  hamming_count_cpu(search, nullptr, counts.data(), nullptr, level, pool);
  const HammingRangeResult within = hamming_range_cpu(search, 8 * kBytes, kNearest, level, pool);

  const int64_t many_count = level == SimdLevel::kAvx512 ? kQueries : kMany;  // whose twin would take minutes
  std::vector<uint8_t> repeated(size_t(many_count * kBytes));
  for (size_t i = 0; i < repeated.size(); ++i) repeated[i] = queries[i % queries.size()];
  HammingSearch many = search;
  many.queries = repeated.data();
  many.query_count = many_count;
  std::vector<int32_t> many_distances(size_t(many_count * kNearest));
  std::vector<int64_t> many_positions(many_distances.size());
  hamming_topk_cpu(many, kNearest, many_distances.data(), many_positions.data(), level, pool);

  bool same = within.count() == int64_t(distances.size()) &&
              std::equal(distances.begin(), distances.end(), within.distances.get()) &&
              std::equal(positions.begin(), positions.end(), within.positions.get());
  for (size_t i = 0; i < many_positions.size(); ++i)
    same &=
        many_positions[i] == positions[i % positions.size()] && many_distances[i] == distances[i % distances.size()];
  for (int64_t q = 0; q < kQueries; ++q) {
    std::vector<int64_t> of_code(size_t(state.count)), expected_counts(size_t(bins), 0), order(of_code.size());
    for (int64_t code = 0; code < state.count; ++code) {
      int64_t& distance = of_code[size_t(code)];
      for (int64_t b = 0; b < kBytes; ++b)
        distance += __builtin_popcount(queries[size_t(q * kBytes + b)] ^ byte_of(code * kBytes + b));
      ++expected_counts[size_t(distance)];
    }
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + kNearest, order.end(), [&](int64_t a, int64_t b) {
      return std::pair(of_code[size_t(a)], a) < std::pair(of_code[size_t(b)], b);
    });
    same &= std::equal(expected_counts.begin(), expected_counts.end(), counts.begin() + q * bins);
    for (int64_t rank = 0; rank < kNearest; ++rank)
      same &= positions[size_t(q * kNearest + rank)] == order[size_t(rank)] &&
              distances[size_t(q * kNearest + rank)] == of_code[size_t(order[size_t(rank)])];
  }
  return same;
}

void write(const State& state, int64_t first) {
  for (int64_t i = first * kBytes; i < state.count * kBytes; ++i) state.memory[size_t(i)] = byte_of(i);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  const auto level = SimdLevel(std::atoi(argv[1]));
  const bool early = argc > 2 && std::strcmp(argv[2], "early") == 0;
  int64_t room = kFirst;
  auto state = std::make_shared<const State>(State{std::shared_ptr<uint8_t[]>(new uint8_t[kFirst * kBytes]), kFirst});
  write(*state, 0);
  std::atomic<bool> done{false}, same{true};
  std::atomic<int> searches{0};

  std::vector<std::thread> readers;
  for (int r = 0; r < kReaders; ++r)
    readers.emplace_back([&] {
      while (!done) {
        const std::shared_ptr<const State> seen = std::atomic_load(&state);
        if (!is_right(*seen, level)) same = false;
        ++searches;
      }
    });
  for (State next = *state; next.count < kLast;) {
    const int64_t first = next.count;
    next.count += kBatch;
    if (next.count > room) {  // as GrowingRows: searches of the old memory keep it
      room = 2 * first;
      std::shared_ptr<uint8_t[]> grown(new uint8_t[size_t(room * kBytes)]);
      std::memcpy(grown.get(), next.memory.get(), size_t(first * kBytes));
      next.memory = grown;
    }
    if (!early) write(next, first);
    std::atomic_store(&state, std::make_shared<const State>(next));
    if (early) write(next, first);
    for (const int before = searches; searches < before + 1;) std::this_thread::yield();
  }
  done = true;
  for (std::thread& reader : readers) reader.join();
  std::puts(same ? "same" : "different");
  return same ? 0 : 1;
}
