// Exact Hamming top-k on the CPU.
//
// Work is cut into items, a block of queries times a chunk of the database, that the threads take one after another. An
// item lays its queries out once, then goes through its chunk tile by tile: lay the tile out, scan it for every query.
// So codes are read from memory once a block of queries and stay in the first-level cache meanwhile; for a large batch
// the arithmetic of the scan is the limit, for one query the memory.
//
// Each query's selector knows, after every candidate, the distance that the next must stay below; a scan only has to
// compare a vector of distances with it, and over N codes in random order about k * (1 + ln(N / k)) pass.
//
// Limits: 2^31 codes a chunk (positions inside are 32-bit); longer databases are cut into more chunks.

#include "hashengine/hamming_topk.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "hamming_kernel.h"
#include "hashengine/types.h"

namespace hashengine {
namespace {

constexpr int64_t kMinQueryBlock = 32;                    // fewer queries do not pay for laying out a tile
constexpr int64_t kMaxQueryBlock = 256;
constexpr int64_t kQueryBytes = 1 << 17;                  // laid-out queries of a block: they pass through the second level
constexpr int64_t kSelectorBytes = int64_t(64) << 20;     // memory of a thread's selectors, above one query's
constexpr int64_t kMinChunkCodes = 1 << 16;               // less is not worth a merge
constexpr int64_t kMaxChunkCodes = int64_t(1) << 31;
constexpr int64_t kItemsPerThread = 4;                    // so that a slow core does not hold up the others
constexpr int64_t kSerialBytes = 1 << 20;                 // query-code bytes below which waking threads costs more

struct Plan {
  int64_t query_block, query_blocks;
  int64_t chunk_codes, chunks;
  int threads;
};

Plan make_plan(const HammingKernel& kernel, const HammingTopk& p, int threads) {
  Plan plan;
  plan.threads = p.query_count * p.code_count * p.code_bytes < kSerialBytes ? 1 : threads;
  const int64_t per_query = Selector::bytes(8 * p.code_bytes, p.k, p.code_count);
  const int64_t most = std::min(kSelectorBytes / per_query, kQueryBytes / kernel.query_bytes(p.code_bytes));
  plan.query_block = std::clamp(ceil_div(p.query_count, kItemsPerThread * plan.threads), kMinQueryBlock, kMaxQueryBlock);
  plan.query_block = std::clamp<int64_t>(most, 1, plan.query_block);
  plan.query_blocks = ceil_div(p.query_count, plan.query_block);
  // Enough chunks to keep every thread busy, where blocks of queries alone do not.
  const int64_t wanted = plan.threads == 1 ? 1 : ceil_div(kItemsPerThread * plan.threads, plan.query_blocks);
  const int64_t useful = std::max<int64_t>(p.code_count / std::max(kMinChunkCodes, 4 * p.k), 1);
  const int64_t needed = ceil_div(p.code_count, kMaxChunkCodes);
  plan.chunk_codes = ceil_div(p.code_count, std::max(std::min(wanted, useful), needed));
  plan.chunks = ceil_div(p.code_count, plan.chunk_codes);
  return plan;
}

// A thread's memory, kept from item to item.
struct Worker {
  std::unique_ptr<Selector[]> selectors;
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* queries;
  uint8_t* tile;

  Worker(const HammingKernel& kernel, const HammingTopk& p, const Plan& plan) : selectors(new Selector[plan.query_block]) {
    constexpr int64_t kAlignment = 64;
    const int64_t query_bytes = ceil_div(plan.query_block * kernel.query_bytes(p.code_bytes), kAlignment) * kAlignment;
    const int64_t tile_bytes = kernel.tile_bytes(kernel.tile_codes(p.code_bytes), p.code_bytes);
    memory.reset(new uint8_t[query_bytes + tile_bytes + kAlignment]);
    queries = memory.get() + (kAlignment - reinterpret_cast<uintptr_t>(memory.get()) % kAlignment);
    tile = queries + query_bytes;
  }
};

// The nearest of one chunk to one block of queries; row q of the result starts at q * stride.
void search_item(const HammingKernel& kernel, const HammingTopk& p, const Plan& plan, Worker& worker, int64_t first_query,
                 int64_t first_code, int32_t* distances, int64_t* positions, int64_t stride) {
  const int64_t queries = std::min(plan.query_block, p.query_count - first_query);
  const int64_t codes = std::min(plan.chunk_codes, p.code_count - first_code);
  const int64_t prepared_bytes = kernel.query_bytes(p.code_bytes);
  for (int64_t q = 0; q < queries; ++q) {
    kernel.prepare_query(p.queries + (first_query + q) * p.code_bytes, p.code_bytes, worker.queries + q * prepared_bytes);
    worker.selectors[q].reset(8 * p.code_bytes, std::min(p.k, codes), codes);
  }
  const int64_t tile_codes = kernel.tile_codes(p.code_bytes);
  for (int64_t begin = 0; begin < codes; begin += tile_codes) {
    const int64_t count = std::min(tile_codes, codes - begin);
    kernel.prepare_tile(p.codes + (first_code + begin) * p.code_bytes, count, p.code_bytes, worker.tile);
    kernel.scan({worker.tile, count, p.code_bytes, uint32_t(begin)}, worker.queries, queries, worker.selectors.get());
  }
  for (int64_t q = 0; q < queries; ++q)
    worker.selectors[q].finish(distances + q * stride, positions + q * stride, first_code);
}

// Merges one query's lists, one a chunk and each in order; chunks stand in order of position, so the first wins a tie.
void merge_chunks(const HammingTopk& p, const Plan& plan, const int32_t* distances, const int64_t* positions, int64_t q) {
  std::vector<int64_t> heads(size_t(plan.chunks), 0);
  for (int64_t rank = 0; rank < p.k; ++rank) {
    int64_t best = -1;
    for (int64_t c = 0; c < plan.chunks; ++c) {
      const int64_t length = std::min(p.k, std::min(plan.chunk_codes, p.code_count - c * plan.chunk_codes));
      if (heads[c] == length) continue;
      if (best < 0 || distances[c * p.k + heads[c]] < distances[best * p.k + heads[best]]) best = c;
    }
    const int64_t from = best * p.k + heads[best]++;
    p.distances[q * p.k + rank] = distances[from];
    p.positions[q * p.k + rank] = positions[from];
  }
}

const HammingKernel& kernel_for(SimdLevel level, int64_t code_bytes) {
#ifdef HE_X86
  if (level == SimdLevel::kAvx512 && code_bytes <= kHammingAvx512.max_code_bytes) return kHammingAvx512;
  if (level == SimdLevel::kAvx2 && code_bytes <= kHammingAvx2.max_code_bytes) return kHammingAvx2;
#endif
  return kHammingScalar;
}

}  // namespace

void hamming_topk_cpu(const HammingTopk& p, SimdLevel level, const ThreadPool& pool) {
  if (p.query_count == 0) return;
  const HammingKernel& kernel = kernel_for(level, p.code_bytes);
  const Plan plan = make_plan(kernel, p, pool.threads);
  const bool direct = plan.chunks == 1;  // else every chunk's list goes to scratch: [query, chunk, k]
  const int64_t stride = direct ? p.k : plan.chunks * p.k;
  std::unique_ptr<int32_t[]> scratch_distances(direct ? nullptr : new int32_t[p.query_count * stride]);
  std::unique_ptr<int64_t[]> scratch_positions(direct ? nullptr : new int64_t[p.query_count * stride]);
  int32_t* distances = direct ? p.distances : scratch_distances.get();
  int64_t* positions = direct ? p.positions : scratch_positions.get();

  std::atomic<int64_t> next_item{0};
  parallel_for(pool, plan.threads, 1, [&](int64_t, int64_t) {
    Worker worker(kernel, p, plan);
    for (int64_t item; (item = next_item++) < plan.query_blocks * plan.chunks;) {
      const int64_t first_query = item / plan.chunks * plan.query_block;
      const int64_t chunk = item % plan.chunks;
      const int64_t row = first_query * stride + chunk * p.k;
      search_item(kernel, p, plan, worker, first_query, chunk * plan.chunk_codes, distances + row, positions + row, stride);
    }
  });
  if (direct) return;
  parallel_for(pool, p.query_count, ceil_div<int64_t>(1 << 16, p.k), [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) merge_chunks(p, plan, distances + q * stride, positions + q * stride, q);
  });
}

}  // namespace hashengine
