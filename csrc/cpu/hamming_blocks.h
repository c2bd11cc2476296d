// How the CPU's Hamming searches are cut into items, a block of queries times a chunk of the database, that the threads
// take one after another. An item lays its queries out once, then goes through its chunk tile by tile. So codes are
// read from memory once a block of queries and stay in the first-level cache meanwhile; for a large batch the
// arithmetic of the scan is the limit, for one query the memory.
#pragma once

#include <atomic>

#include "hamming_tiles.h"
#include "hashengine/types.h"

namespace hashengine {

constexpr int64_t kHammingMaxChunk = int64_t(1) << 31;      // codes, whose positions have 32 bits
constexpr int64_t kHammingThreadBytes = int64_t(24) << 20;  // of a thread's memory, above one query's

// The level's kernel for any number of queries.
const HammingKernel& hamming_kernel(SimdLevel level, const HammingSearch& search);
// The one for whole blocks of them; null where the level has none, or the codes do not pay for laying out a block.
const HammingKernel* hamming_block_kernel(SimdLevel level, const HammingSearch& search);

struct HammingPlan {
  const HammingKernel* kernel;
  int64_t query_block, query_blocks;
  int64_t chunk_codes, chunks;
  int threads;

  // per_query: bytes of a thread's memory for each query of a block; least_chunk: fewer codes are not worth a chunk;
  // most_chunk: a multiple of 64.
  HammingPlan(const HammingKernel& kernel, const HammingSearch& search, int64_t per_query, int64_t least_chunk,
              int most_threads, int64_t most_chunk = kHammingMaxChunk);

  int64_t items() const { return query_blocks * chunks; }

  bool is_long = false;  // so that clearing megabytes for it does not matter
};

// A thread's memory. Of much of it, in a long search, the pages are huge ones: small ones cost a fault each, and more
// of them than a first-level TLB holds slow a scan down.
class ThreadMemory {
 public:
  ThreadMemory() = default;
  ~ThreadMemory();
  ThreadMemory(const ThreadMemory&) = delete;
  ThreadMemory& operator=(const ThreadMemory&) = delete;

  // Room for so many bytes, at a multiple of 64; what was there is lost where it grows.
  uint8_t* reserve(int64_t bytes, bool is_long);

 private:
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
  void* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
};

// A thread's part of the work, and its memory, which it keeps from item to item.
class HammingItem {
 public:
  HammingItem(const HammingPlan& plan, const HammingSearch& search);

  void set(int64_t item);

  // work(tile) for each tile of the chunk, or of codes [first, last) of it.
  template <typename Work>
  void for_each_tile(Work work) {
    for_each_tile(first_code, last_code, work);
  }
  template <typename Work>
  void for_each_tile(int64_t first, int64_t last, Work work) {
    HammingTile tile;
    for (tiles_.start(first_code, first, last); tiles_.next(tile);) work(tile);
  }

  // The bitmap of a query of the block, from the chunk's first code on; null where it has none of its own.
  const uint8_t* filter_of(int64_t query) const {
    if (search_.filter == nullptr || search_.filter_stride == 0) return nullptr;
    return search_.filter + (first_query + query) * search_.filter_stride + first_code / 8;
  }

  int64_t bins() const { return 8 * search_.code_bytes + 1; }  // distances that there are
  int64_t tile_codes() const { return tiles_.tile_codes(); }
  // How many distances measuring a tile may write.
  size_t tile_distances() const { return size_t(ceil_div(tile_codes(), kTileCodesMultiple) * kTileCodesMultiple); }

  int64_t number = 0;  // of the plan's items
  int64_t chunk = 0;
  int64_t first_query = 0;
  int64_t first_code = 0, last_code = 0;
  HammingQueries queries{};

 private:
  const HammingPlan& plan_;
  const HammingSearch& search_;
  TileStream tiles_;
  ThreadMemory memory_;
  uint8_t* prepared_;
};

// work(item, state) for every item, with one of `states` for each thread, of which there are as many as the plan's.
template <typename State, typename Work>
void for_each_item(const HammingPlan& plan, const HammingSearch& search, const ThreadPool& pool,
                   std::vector<State>& states, Work work) {
  std::atomic<int64_t> next{0};
  parallel_for(pool, plan.threads, 1, [&](int64_t thread, int64_t) {
    HammingItem item(plan, search);
    for (int64_t number; (number = next++) < plan.items();) {
      item.set(number);
      work(item, states[size_t(thread)]);
    }
  });
}

template <typename State, typename Work>
void for_each_item(const HammingPlan& plan, const HammingSearch& search, const ThreadPool& pool, Work work) {
  std::vector<State> states(size_t(plan.threads));
  for_each_item(plan, search, pool, states, work);
}

}  // namespace hashengine
