// Exact Hamming top-k and range search on the CPU.
//
// Each query's selector knows, after every candidate, the distance that the next must stay below; a scan only has to
// compare a vector of distances with it, and over N codes in random order about k * (1 + ln(N / k)) pass. For a large k
// a sample of the codes tells a bound to begin with (hamming_sample.cpp), so that only a few k pass. Each chunk yields
// a list for each query, and what the lists of a query hold is sorted by counting.

#include <deque>
#include <utility>

#include "hamming_blocks.h"
#include "hamming_rank.h"
#include "hamming_sample.h"
#include "hashengine/huge_pages.h"

namespace hashengine {
namespace {

constexpr int64_t kMinChunkCodes = 1 << 16;  // less is not worth a list
constexpr int64_t kLeastRoom = 512;          // candidates of a query that a thread has room for
constexpr int64_t kRankedShare = 8;          // of the codes; a longer ranking is made by counting
constexpr int64_t kLongSort = 16;            // candidates of each distance that pay for several counts
constexpr uint32_t kUnbounded = UINT32_MAX;
constexpr int64_t kListBytes = int64_t(10) << 20;  // of the lists of the queries that are searched together

// A part of a search's queries, and the kernel for it.
struct Batch {
  HammingSearch search;
  int64_t first_query;
  const HammingKernel* kernel;
};

HammingSearch part_of(const HammingSearch& search, int64_t first, int64_t count) {
  HammingSearch part = search;
  part.query_count = count;
  part.queries += first * search.code_bytes;
  if (part.filter) part.filter += first * search.filter_stride;
  return part;
}

// The next queries from `first` on, at most `most`: whole blocks where that pays, then the rest.
Batch next_batch(const HammingSearch& search, int64_t first, int64_t most, int64_t per_query, SimdLevel level) {
  const int64_t count = std::min(search.query_count - first, std::max<int64_t>(most, 1));
  if (const HammingKernel* const kernel = hamming_block_kernel(level, search)) {
    const int64_t block = std::min(kernel->block_queries, kHammingThreadBytes / per_query);
    if (block >= kernel->least_queries) {
      const int64_t rest = count % block;
      const int64_t in_blocks = count - (rest >= kernel->least_queries ? 0 : rest);
      if (in_blocks) return {part_of(search, first, in_blocks), first, kernel};
    }
  }
  const HammingSearch part = part_of(search, first, count);
  return {part, first, &hamming_kernel(level, part)};
}

// The nearest of one chunk to one query, in order of position, which counts from `offset`.
struct List {
  const uint32_t* begin;
  const uint32_t* end;
  int64_t offset;
};

// What batches use one after another; its pages are cleared but once.
struct Memory {
  explicit Memory(int threads) : threads(size_t(threads)) {}

  struct Thread {
    std::vector<Selector> selectors;  // of each query of the block
    ThreadMemory candidates;
  };
  std::vector<Thread> threads;
  std::deque<ThreadMemory> parts;  // [chunk, block of queries]
};

// What each chunk yields for each query of a batch.
class Lists {
 public:
  // Candidates below the bound of their query, at most `limit`, the nearest; about `expected` are there.
  Lists(const Batch& batch, int64_t per_query, int64_t least_chunk, const std::vector<uint32_t>& bounds, int64_t limit,
        int64_t expected, const ThreadPool& pool, Memory& memory)
      : format_(batch.search.code_bytes),
        plan_(*batch.kernel, batch.search, per_query, least_chunk, pool.threads, format_.positions()),
        parts_(size_t(plan_.items())),
        code_bytes_(batch.search.code_bytes) {
    const int64_t chunks = std::max<int64_t>(plan_.chunks, 1);  // of no codes there is none
    const int64_t room = std::min(2 * ceil_div(expected, chunks) + kLeastRoom, plan_.chunk_codes);
    while (memory.parts.size() < parts_.size()) memory.parts.emplace_back();
    for_each_item(plan_, batch.search, pool, memory.threads, [&](HammingItem& item, Memory::Thread& own) {
      const int64_t codes = item.last_code - item.first_code, length = std::min(limit, codes);
      std::vector<Selector>& selectors = own.selectors;
      selectors.resize(std::max(selectors.size(), size_t(plan_.query_block)));
      uint32_t* const candidates = reserve(own.candidates, plan_.query_block * room);
      for (int64_t q = 0; q < item.queries.count; ++q)
        selectors[size_t(q)].reset(format_, length, codes, bound_of(item, q, bounds[size_t(item.first_query + q)]),
                                   item.filter_of(q), candidates + q * room, room);
      item.for_each_tile([&](const HammingTile& tile) { plan_.kernel->scan(tile, item.queries, selectors.data()); });
      Part& part = parts_[size_t(item.number)];
      part.begins.push_back(0);
      for (int64_t q = 0; q < item.queries.count; ++q) {
        const Selector& selector = selectors[size_t(q)];
        const int64_t found = selector.found();
        part.begins.push_back(part.begins.back() + found);
        part.bounds.push_back(found == limit ? selector.bound() : kUnbounded);
      }
      part.candidates = reserve(memory.parts[size_t(item.number)], part.begins.back() + 1);
      for (size_t q = 0; q < size_t(item.queries.count); ++q) selectors[q].copy_to(part.candidates + part.begins[q]);
      part.is_done = true;
    });
  }

  int64_t found(int64_t query) const {
    int64_t found = 0;
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      const List list = list_of(query, chunk);
      found += list.end - list.begin;
    }
    return found;
  }

  // Writes a query's first `limit` by (distance, position), or as many as there are; returns their number.
  int64_t sort(int64_t query, int64_t limit, int32_t* distances, int64_t* positions) const {
    const bool is_long = found(query) >= kLongSort * bins();
    return is_long ? sort<4>(query, limit, distances, positions) : sort<1>(query, limit, distances, positions);
  }

 private:
  struct Part {
    uint32_t* candidates;
    std::vector<int64_t> begins;  // of each query of the block, and the end
    std::vector<uint32_t> bounds;
    std::atomic<bool> is_done{false};
  };

  // The lists stand in order of position, and so do the candidates of each, so that counting distances sorts them. Each
  // list is cut into streams that take turns, with counts of their own: two increments of one count in a row wait for
  // each other in memory.
  template <int kStreams>
  int64_t sort(int64_t query, int64_t limit, int32_t* distances, int64_t* positions) const {
    const int64_t rows = kStreams * plan_.chunks;
    std::vector<int64_t> ranks(size_t(rows * bins()), 0);  // of each stream's next of each distance
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      int64_t* const counts = ranks.data() + chunk * kStreams * bins();
      visit<kStreams>(list_of(query, chunk), [&](int64_t stream, uint32_t candidate) {
        ++counts[stream * bins() + format_.distance(candidate)];
      });
    }
    int64_t found = 0;
    for (int64_t distance = 0; distance < bins(); ++distance) {
      const int64_t begin = found;
      for (int64_t row = 0; row < rows; ++row) found += std::exchange(ranks[size_t(row * bins() + distance)], found);
      for (int64_t rank = begin; rank < std::min(found, limit); ++rank) distances[rank] = int32_t(distance);
    }
    int64_t dropped;
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      int64_t* const next = ranks.data() + chunk * kStreams * bins();
      const List list = list_of(query, chunk);
      visit<kStreams>(list, [&](int64_t stream, uint32_t candidate) {
        const int64_t rank = next[stream * bins() + format_.distance(candidate)]++;
        *(rank < limit ? positions + rank : &dropped) = list.offset + int64_t(format_.position(candidate));
      });
    }
    return std::min(found, limit);
  }

  // visit(stream, candidate) for each of a list.
  template <int kStreams, typename Visit>
  static void visit(const List& list, const Visit& visit) {
    const int64_t length = (list.end - list.begin) / kStreams;
    for (int64_t i = 0; i < length; ++i)
#pragma GCC unroll 4
      for (int64_t stream = 0; stream < kStreams; ++stream) visit(stream, list.begin[stream * length + i]);
    for (const uint32_t* rest = list.begin + kStreams * length; rest != list.end; ++rest) visit(kStreams - 1, *rest);
  }

  int64_t bins() const { return 8 * code_bytes_ + 1; }  // distances that there are

  uint32_t* reserve(ThreadMemory& memory, int64_t candidates) const {
    return reinterpret_cast<uint32_t*>(memory.reserve(candidates * int64_t(sizeof(uint32_t)), plan_.is_long));
  }

  // What the chunks that are done leave for a query of the item to find: where one has as many as are wanted, only what
  // is nearer than the last of these, or as near and stands before it.
  uint32_t bound_of(const HammingItem& item, int64_t query, uint32_t bound) const {
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      const Part& part = part_at(item.first_query, chunk);
      if (part.is_done && part.bounds[size_t(query)] != kUnbounded)
        bound = std::min(bound, part.bounds[size_t(query)] + (chunk > item.chunk));
    }
    return bound;
  }

  const Part& part_at(int64_t query, int64_t chunk) const {
    return parts_[size_t(chunk * plan_.query_blocks + query / plan_.query_block)];
  }

  List list_of(int64_t query, int64_t chunk) const {
    const Part& part = part_at(query, chunk);
    const auto row = size_t(query % plan_.query_block);
    return {part.candidates + part.begins[row], part.candidates + part.begins[row + 1], chunk * plan_.chunk_codes};
  }

  const HammingCandidates format_;
  const HammingPlan plan_;
  std::vector<Part> parts_;  // [chunk, block of queries]
  const int64_t code_bytes_;
};

// The first `count` values, with room for as many as `to`.
template <typename T>
std::unique_ptr<T[]> grown(const std::unique_ptr<T[]>& values, int64_t count, int64_t to) {
  std::unique_ptr<T[]> room(new T[size_t(to)]);
  use_huge_pages(room.get(), to * int64_t(sizeof(T)));
  std::copy_n(values.get(), count, room.get());
  return room;
}

}  // namespace

void hamming_topk_cpu(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions, SimdLevel level,
                      const ThreadPool& pool) {
  if (k > kMinRanked && k > search.code_count / kRankedShare)
    return hamming_rank(search, k, distances, positions, level, pool);
  const auto most_bound = uint32_t(8 * search.code_bytes + 1);
  const int64_t per_query = Selector::bytes(most_bound, k, search.code_count);
  const int64_t together = kListBytes / (k * int64_t(sizeof(uint32_t)));
  Memory memory(pool.threads);
  const auto find = [&](const Batch& batch, const std::vector<uint32_t>& bounds) {
    return Lists(batch, per_query, std::max(kMinChunkCodes, 4 * k), bounds, k, k, pool, memory);
  };
  for (int64_t first = 0; first < search.query_count;) {
    const Batch batch = next_batch(search, first, together, per_query, level);
    const std::vector<uint32_t> bounds = sample_bounds(batch.search, k, level, pool);
    const Lists lists = find(batch, bounds);
    parallel_for(pool, batch.search.query_count, ceil_div<int64_t>(1 << 14, k), [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        const int64_t row = (first + q) * k, found = lists.sort(q, k, distances + row, positions + row);
        std::fill(distances + row + found, distances + row + k, int32_t(most_bound));
        std::fill(positions + row + found, positions + row + k, int64_t(-1));
      }
    });
    // To what a sample told too little; these lists take the memory of the batch's, which are sorted.
    for (int64_t q = 0; q < batch.search.query_count; ++q) {
      if (bounds[size_t(q)] == most_bound || lists.found(q) >= k) continue;
      const Batch astray = {part_of(batch.search, q, 1), first + q,
                            &hamming_kernel(level, part_of(batch.search, q, 1))};
      find(astray, {most_bound}).sort(0, k, distances + (first + q) * k, positions + (first + q) * k);
    }
    first += batch.search.query_count;
  }
}

HammingRangeResult hamming_range_cpu(const HammingSearch& search, int64_t radius, int64_t max_results, SimdLevel level,
                                     const ThreadPool& pool) {
  constexpr int64_t kExpected = 1024;  // results a query; more take more memory
  const int64_t per_query = Selector::bytes(radius, std::min(max_results, kExpected), search.code_count);
  Memory memory(pool.threads);
  HammingRangeResult result;
  result.lims.push_back(0);
  for (int64_t first = 0; first < search.query_count;) {
    const Batch batch = next_batch(search, first, search.query_count, per_query, level);
    const std::vector<uint32_t> bounds(size_t(batch.search.query_count), uint32_t(radius + 1));
    const Lists lists(batch, per_query, kMinChunkCodes, bounds, max_results, std::min(max_results, kExpected), pool,
                      memory);
    for (int64_t q = 0; q < batch.search.query_count; ++q)
      result.lims.push_back(result.lims.back() + std::min(lists.found(q), max_results));
    const int64_t before = result.lims[size_t(first)];
    result.distances = grown(result.distances, before, result.count());
    result.positions = grown(result.positions, before, result.count());
    parallel_for(pool, batch.search.query_count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        const int64_t at = result.lims[size_t(first + q)];
        lists.sort(q, result.lims[size_t(first + q) + 1] - at, result.distances.get() + at,
                   result.positions.get() + at);
      }
    });
    first += batch.search.query_count;
  }
  return result;
}

}  // namespace hashengine
