// A program that searches while codes are appended. It is built with ThreadSanitizer, which reports data races. Each
// reader searches the codes of a snapshot with several threads. Meanwhile a writer appends codes and publishes the next
// snapshot, as hashengine/index does. If the memory of the snapshot has room, the new codes go into the same memory.
//
//   concurrent_append <level>          prints "same" if every answer agreed with the definition of a search
//   concurrent_append <level> early    publishes codes before it writes them: a race that the sanitizer must report
//
// <level> is the number of a SimdLevel.

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

// There are kFirst codes at the start and kLast at the end; each append adds kBatch. A code has kBytes bytes, and a
// query has kNearest results.
constexpr int64_t kBytes = 16, kQueries = 2, kNearest = 50, kFirst = 40000, kLast = 85000, kBatch = 3000;
constexpr int64_t kManyQueries = 150;  // enough for the bit-sliced kernel of AVX2
constexpr int kReaders = 2, kThreads = 2;

struct Snapshot {
  std::shared_ptr<uint8_t[]> memory;
  int64_t count;
};

// Byte i of the codes, computed from i alone. It has few different values, so that many distances are equal.
uint8_t byte_of(int64_t i) { return uint8_t((uint64_t(i) * 0x9E3779B97F4A7C15u) >> 56) & 0x31; }

void run(int64_t count, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> workers;
  for (int64_t t = 0; t < kThreads; ++t) {
    const int64_t begin = count * t / kThreads, end = count * (t + 1) / kThreads;
    if (begin < end) workers.emplace_back(body, context, begin, end);
  }
  for (std::thread& worker : workers) worker.join();
}

// Whether the results of searches in a snapshot agree with the definition of the searches.
bool is_right(const Snapshot& snapshot, SimdLevel level) {
  std::vector<uint8_t> queries(size_t(kQueries * kBytes));
  for (size_t i = 0; i < queries.size(); ++i) queries[i] = byte_of(int64_t(i) * 7 + snapshot.count);
  const HammingSearch search{queries.data(), snapshot.memory.get(), kQueries, snapshot.count, kBytes, nullptr, 0};
  const ThreadPool pool{run, kThreads};
  const int64_t distance_count = search.distance_count();
  std::vector<int32_t> distances(size_t(kQueries * kNearest));
  std::vector<int64_t> positions(distances.size()), counts(size_t(kQueries * distance_count));
  hamming_topk_cpu(search, kNearest, distances.data(), positions.data(), level, pool);
  hamming_count_cpu(search, nullptr, counts.data(), nullptr, level, pool);
  const HammingRangeResult within = hamming_range_cpu(search, 8 * kBytes, kNearest, level, pool);

  // For AVX-512, this program has plain C++ in place of the intrinsics (avx512_twins), so many queries would be slow.
  const int64_t many_count = level == SimdLevel::kAvx512 ? kQueries : kManyQueries;
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
    std::vector<int64_t> code_distances(size_t(snapshot.count)), expected_counts(size_t(distance_count), 0),
        order(code_distances.size());
    for (int64_t code = 0; code < snapshot.count; ++code) {
      int64_t& distance = code_distances[size_t(code)];
      for (int64_t b = 0; b < kBytes; ++b)
        distance += __builtin_popcount(queries[size_t(q * kBytes + b)] ^ byte_of(code * kBytes + b));
      ++expected_counts[size_t(distance)];
    }
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + kNearest, order.end(), [&](int64_t a, int64_t b) {
      return std::pair(code_distances[size_t(a)], a) < std::pair(code_distances[size_t(b)], b);
    });
    same &= std::equal(expected_counts.begin(), expected_counts.end(), counts.begin() + q * distance_count);
    for (int64_t rank = 0; rank < kNearest; ++rank)
      same &= positions[size_t(q * kNearest + rank)] == order[size_t(rank)] &&
              distances[size_t(q * kNearest + rank)] == code_distances[size_t(order[size_t(rank)])];
  }
  return same;
}

void write(const Snapshot& snapshot, int64_t first) {
  for (int64_t i = first * kBytes; i < snapshot.count * kBytes; ++i) snapshot.memory[size_t(i)] = byte_of(i);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  const auto level = SimdLevel(std::atoi(argv[1]));
  const bool publishes_early = argc > 2 && std::strcmp(argv[2], "early") == 0;
  int64_t capacity = kFirst;
  auto snapshot =
      std::make_shared<const Snapshot>(Snapshot{std::shared_ptr<uint8_t[]>(new uint8_t[kFirst * kBytes]), kFirst});
  write(*snapshot, 0);
  std::atomic<bool> done{false}, same{true};
  std::atomic<int> searches{0};

  std::vector<std::thread> readers;
  for (int r = 0; r < kReaders; ++r)
    readers.emplace_back([&] {
      while (!done) {
        const std::shared_ptr<const Snapshot> seen = std::atomic_load(&snapshot);
        if (!is_right(*seen, level)) same = false;
        ++searches;
      }
    });
  for (Snapshot next = *snapshot; next.count < kLast;) {
    const int64_t first = next.count;
    next.count += kBatch;
    if (next.count > capacity) {  // moves to larger memory; running searches keep the old memory alive
      capacity = 2 * first;
      std::shared_ptr<uint8_t[]> grown(new uint8_t[size_t(capacity * kBytes)]);
      std::memcpy(grown.get(), next.memory.get(), size_t(first * kBytes));
      next.memory = grown;
    }
    if (!publishes_early) write(next, first);
    std::atomic_store(&snapshot, std::make_shared<const Snapshot>(next));
    if (publishes_early) write(next, first);
    for (const int before = searches; searches < before + 1;) std::this_thread::yield();
  }
  done = true;
  for (std::thread& reader : readers) reader.join();
  std::puts(same ? "same" : "different");
  return same ? 0 : 1;
}
