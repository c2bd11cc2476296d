// How a Hamming search is divided between threads. A work item is a block of queries together with a chunk of the
// database. The threads take the items one after another.
//
// For each item, a thread prepares the queries once and then goes through the chunk tile by tile. Codes are therefore
// read from memory once per block of queries, and a tile stays in a cache while the block is compared with it. With
// many queries, the speed is limited by the arithmetic of the scan; with a single query, by the memory bandwidth.
#pragma once

#include <array>
#include <atomic>
#include <memory>

#include "cpu/hamming/tiles.h"
#include "hashengine/types.h"

namespace hashengine {

constexpr int64_t kMaxChunkCodes = int64_t(1) << 31;        // so that positions in a chunk fit in 32 bits
constexpr int64_t kThreadScratchBytes = int64_t(34) << 20;  // for all queries of a block; a single query may take more

// The kernel of a SIMD level that takes any number of queries.
//
// The level AVX-512 takes the kernels of AVX2 except where its own were faster in a measurement (on Zen 4): for blocks
// of many queries. AVX2 has no vector kernel for the longest codes.
const HammingKernel& hamming_kernel(SimdLevel level, const HammingSearch& search);
// The kernels of a SIMD level for blocks of many queries, the one for the largest blocks first. An entry is null if
// there is no kernel for codes of this length, or if there are too few codes to repay building the tables of a block.
std::array<const HammingKernel*, 2> bitsliced_hamming_kernels(SimdLevel level, const HammingSearch& search);

struct HammingPlan {
  const HammingKernel* kernel;
  int64_t query_block, query_blocks;
  int64_t chunk_codes, chunks;
  int threads;
  bool is_long = false;  // whether the search takes so long that zeroing some megabytes of huge pages costs little

  // bytes_per_query: the scratch memory of a thread for each query of a block. Every chunk but the last has at least
  // min_chunk_codes codes. No chunk has more than max_chunk_codes codes, which must be a multiple of 64. If not both
  // are possible, max_chunk_codes has priority.
  HammingPlan(const HammingKernel& kernel, const HammingSearch& search, int64_t bytes_per_query,
              int64_t min_chunk_codes, int max_threads, int64_t max_chunk_codes = kMaxChunkCodes);

  int64_t items() const { return query_blocks * chunks; }
};

// A growing buffer. A small one is on the heap, because mapping and faulting in new pages would take longer than a
// short search. A larger one consists of whole pages. Large buffers of long searches use huge pages, because each small
// page costs a page fault, and because a scan is slower if the first-level TLB cannot hold all its pages.
class PageBuffer {
 public:
  PageBuffer() = default;
  ~PageBuffer();
  PageBuffer(const PageBuffer&) = delete;
  PageBuffer& operator=(const PageBuffer&) = delete;

  // Returns at least `bytes` bytes, aligned to 64 bytes. Growing discards the contents.
  uint8_t* reserve(int64_t bytes, bool is_long_search);

 private:
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
  std::unique_ptr<uint8_t[]> heap_;
  void* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
};

// The item that a thread works on. Its buffers are reused from item to item.
class WorkItem {
 public:
  WorkItem(const HammingPlan& plan, const HammingSearch& search);

  // Moves to item `item` of the plan and prepares its queries.
  void set(int64_t item);

  // Calls work(tile) for each tile of the chunk.
  template <typename Work>
  void for_each_tile(Work work) {
    for_each_tile(first_code, end_code, work);
  }
  // The same for the codes [begin, end) of the database, which must lie in the chunk.
  template <typename Work>
  void for_each_tile(int64_t begin, int64_t end, Work work) {
    HammingTile tile;
    for (tiles_.start(first_code, begin, end); tiles_.next(tile);) work(tile);
  }

  // The number of distances for which an array of those of one tile must have room.
  int64_t tile_room() const { return round_up(tiles_.tile_codes(), kDistancesMultiple); }

  // Writes the distances of every code of the tile from query `query` of the block, which is even, and from the next
  // one. If there is no next one, `second` is undefined. `Distance` is the type of with_distance_type() or a larger
  // one.
  template <typename Distance>
  void compute_distances(const HammingTile& tile, int64_t query, Distance* first, Distance* second) {
    const HammingKernel& kernel = *plan_.kernel;
    if constexpr (sizeof(Distance) == 1)
      if (kernel.compute_byte_distances) return kernel.compute_byte_distances(tile, queries, query, first, second);
    if constexpr (sizeof(Distance) == 2)
      if (kernel.compute_short_distances) return kernel.compute_short_distances(tile, queries, query, first, second);
    for (int64_t q = query; q < std::min(query + 2, queries.count); ++q) {
      Distance* const distances = q == query ? first : second;
      if constexpr (sizeof(Distance) == 4) {
        kernel.compute_distances(tile, queries, q, distances);
      } else {
        wide_distances_.resize(size_t(tile_room()));
        kernel.compute_distances(tile, queries, q, wide_distances_.data());
        for (int64_t i = 0; i < tile.count; ++i) distances[i] = Distance(wide_distances_[size_t(i)]);
      }
    }
  }

  // Calls work(query of the block, tile, distances) for each tile of the codes [begin, end) and each query of the
  // block. `scratch` provides memory for the distances of a tile; `work` may overwrite them, and has room for a
  // multiple of kDistancesMultiple.
  template <typename Distance, typename Work>
  void for_each_tile_and_query(int64_t begin, int64_t end, std::vector<Distance>& scratch, Work work) {
    scratch.resize(size_t(2 * tile_room()));
    Distance* const distances[2] = {scratch.data(), scratch.data() + tile_room()};
    for_each_tile(begin, end, [&](const HammingTile& tile) {
      for (int64_t q = 0; q < queries.count; ++q) {
        if (q % 2 == 0) compute_distances(tile, q, distances[0], distances[1]);
        work(q, tile, distances[q % 2]);
      }
    });
  }

  // The filter of a query of the block: a bitmap that starts at the chunk's first code. Null if there is no filter, or
  // if all queries share one, because then the tiles contain only codes that pass it.
  const uint8_t* filter_of(int64_t query) const {
    if (search_.filter == nullptr || search_.filter_stride == 0) return nullptr;
    return search_.filter + (first_query + query) * search_.filter_stride + first_code / 8;
  }

  int64_t number = 0;  // the item's number in the plan
  int64_t chunk = 0;
  int64_t first_query = 0;
  int64_t first_code = 0, end_code = 0;
  QueryBlock queries{};

 private:
  const HammingPlan& plan_;
  const HammingSearch& search_;
  TileStream tiles_;
  PageBuffer memory_;
  uint8_t* prepared_queries_;
  std::vector<uint32_t> wide_distances_;  // of a tile
};

// Calls work(item, state) for every item. states: one per thread of the plan.
template <typename State, typename Work>
void for_each_item(const HammingPlan& plan, const HammingSearch& search, const ThreadPool& pool,
                   std::vector<State>& states, Work work) {
  std::atomic<int64_t> next{0};
  parallel_for(pool, plan.threads, 1, [&](int64_t thread, int64_t) {
    WorkItem item(plan, search);
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
