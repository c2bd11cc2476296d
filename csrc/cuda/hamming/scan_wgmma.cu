// The scan that finds candidates with Hopper's matrix instruction `wgmma`. A warpgroup (four warps) holds 64 codes in
// registers and compares them with 256 queries at a time.
//
// Idea. bit_rows.cuh writes codes as rows and queries as columns of 1-bit matrices. The matrix instructions compute one
// sum per code and query. The candidate bit of a sum is set if the code is within the query's maximum distance. A block
// keeps the columns of its queries in shared memory (up to 6,144 queries of 64 bits) and compares all codes of its
// segment with them. While one of its warpgroups uses the matrix unit, the others check their sums. A three-input OR
// checks two sums. The ORs give one result for each part of a thread's 128 sums. If the candidate bit is set in one of
// them, the thread queues the numbers of the parts (part_queue.cuh). The warp computes the distances of the queued
// parts together, when many have accumulated.
//
// Instructions, for codes of 64 bits (SASS of nvcc 13.0 for sm_90a). A warp executes 81 to compare its 16 codes with
// 256 queries; 67 of them are ORs and the test of their result. If there are hits, it executes 28 more to queue those
// of all its lanes, and later about 460 for each 32 entries of the queue. Before a chunk, 32 queries take 29, and 46
// more if one of their maximum distances has changed.
//
// Time (estimated). 64 x 256 distances need one matrix instruction for codes of up to 128 bits, two for 256 bits, four
// for 512 bits and eight for 1,024 bits. An instruction takes 128 cycles. The ORs occupy each of the SM's four
// schedulers for about 136 cycles, two per instruction. The codes are read once per group of queries, 8 bytes per code
// of 64 bits. Memory is not the bottleneck.
//
// Launch. Two or three warpgroups per block, one block per SM. Each block has a group of queries and a segment of the
// codes. In each round a block compares the next 128 or 192 codes of its segment. The segments are interleaved: of
// the codes that consecutive rounds compare, each segment has every n-th group of 128 or 192. The near codes of a
// sorted database are thus distributed over the blocks. The columns are updated before each chunk of rounds, from
// margins that the blocks compute in shares and publish (candidates.cuh). A chunk has twice as many rounds as the one
// before, up to kMaxRounds.
//
// Limits. Codes of at most kMaxMatrixWords words. Compute capability 9.0, in code for 9.0a; in other code the kernel is
// empty.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/hamming/bit_rows.cuh"
#include "cuda/hamming/part_queue.cuh"
#include "cuda/hamming/query_columns.cuh"
#include "cuda/hamming/topk_steps.h"
#include "cuda/hamming/wgmma.cuh"

namespace hashengine {
namespace {

constexpr int kWarpgroupCodes = 64;
constexpr int64_t kColumnBytes = 192 << 10;  // shared memory for the columns of a group
// The columns are aligned to a core matrix, which has 128 bytes. It is not known whether wgmma requires this.
constexpr int64_t kColumnAlignment = 128;

// Codes of more than 8 words have rows of four or more slices of 256 bits. A warpgroup then needs more than a third of
// the SM's registers, including 128 sums per thread, so only two warpgroups fit. They suffice to keep the matrix unit
// busy, because each sum takes at least four matrix instructions.
template <int kWords>
constexpr int kWarpgroups = kWords <= 8 ? 3 : 2;
template <int kWords>
constexpr int kBlockThreads = kWarpgroups<kWords> * kWarpgroupThreads;
template <int kWords>
constexpr int kRoundCodes = kWarpgroups<kWords> * kWarpgroupCodes;  // codes that a block compares at a time
[[maybe_unused]] constexpr int kFirstRounds = 4, kMaxRounds = 64;   // rounds of the first and of the longest chunk

// A query tile is the columns of 256 queries: kSlices column tiles (bit_matrix.cuh), one after another.
template <int kWords>
constexpr int kQueryTileWords = BitRows<kWords>::kSlices * kWgmmaColumns * kSliceWords;

// Updates the columns of the queries whose maximum distance has changed. Codes at position `first` or later will be
// compared with these columns. A thread loads the bounds of several queries at a time, because one load has a latency
// of about the time in which a warpgroup compares its codes with 256 queries (estimated).
template <int kWords>
__device__ __forceinline__ void update_columns(const DeviceSearch& search, const Candidates& candidates,
                                               int64_t first_query, int queries, int64_t first,
                                               const QueryColumns<kWords>& columns) {
  constexpr int kQueries = 4, kThreads = kBlockThreads<kWords>;
  for (int begin = threadIdx.x; begin < queries; begin += kQueries * kThreads) {
    int updated[kQueries];
#pragma unroll
    for (int i = 0; i < kQueries; ++i)
      updated[i] = candidates.published_max_distance(first_query + min(begin + i * kThreads, queries - 1), first);
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const int q = begin + i * kThreads;
      if (q < queries) columns.update(search.queries, first_query + q, q, updated[i]);
    }
  }
  fence_matrix_reads();
}

// Publishes the margins of a share of the block's queries: of every `shares`-th query, beginning with query `share`.
template <int kWords>
__device__ __forceinline__ void tighten_share(const Candidates& candidates, int64_t first_query, int queries, int share,
                                              int shares) {
  for (int64_t q = share + int64_t{threadIdx.x} * shares; q < queries; q += int64_t{kBlockThreads<kWords>} * shares)
    candidates.tighten(first_query + q);
}

// The OR of kCount sums; kCount is even.
template <int kCount>
__device__ __forceinline__ uint32_t or_all(const uint32_t* sums) {
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) any = or3(any, sums[i], sums[i + 1]);
  return any;
}

// Queues the parts of a lane's sums that have hits. The warp's first code is at position `first`. If the queue then
// lacks space for the hits of another tile, sets `end` to the next tile.
template <int kWords>
__device__ __forceinline__ void queue_hits(const uint32_t (&sums)[kWgmmaSums], int tile, int64_t first,
                                           PartQueue<kWords>& queue, unsigned& queued, int& end) {
  using Queue = PartQueue<kWords>;
  constexpr uint32_t kBit = BitRows<kWords>::kCandidateBit;
  uint32_t any[Queue::kParts];
#pragma unroll
  for (int part = 0; part < Queue::kParts; ++part) any[part] = or_all<Queue::kPartSums>(sums + Queue::kPartSums * part);
  const bool has_hits = masked(or_all<Queue::kParts>(any), kBit) != 0;
  const unsigned lanes = __ballot_sync(kWholeWarp, has_hits);
  if (lanes == 0) return;
  uint32_t parts = 0;
#pragma unroll
  for (int part = 0; part < Queue::kParts; ++part) parts |= ((any[part] & kBit) / kBit) << part;
  queue.push(has_hits, lanes, parts, tile, first, queued);
  if (queued > Queue::kMaxCount) end = tile + 1;
}

// The number of entries that a warp's queue must have for the warp to add their hits after a round. The warps of a
// warpgroup wait for each other at the next wgmma, so they should add hits after the same round. Their numbers of
// entries differ, therefore the number is small after every fourth round and larger after the others.
[[maybe_unused]] __device__ __forceinline__ unsigned min_entries(int round) { return round % 4 == 3 ? 24 : 64; }

// Compares the warp's 16 codes, which start at position `first`, with all columns. Queues the hits. Adds queued hits to
// the candidates if there are at least `min_count` entries, or the queue is full; all of them if min_count is 1. The
// four warps of a warpgroup must call together, each with its 16 of the warpgroup's 64 codes.
template <int kWords>
__device__ __forceinline__ void compare(const DeviceSearch& search, const Candidates& candidates,
                                        const QueryColumns<kWords>& columns, int64_t first_query, int query_tiles,
                                        uint32_t first_tile, uint32_t (&rows)[BitRows<kWords>::kBuiltSlices][4],
                                        int64_t first, unsigned min_count, PartQueue<kWords>& queue, unsigned& queued) {
  using Rows = BitRows<kWords>;
  uint32_t ones[4] = {~0u, ~0u, ~0u, ~0u};
  const auto pin_rows = [&] {
#pragma unroll
    for (int slice = 0; slice < Rows::kBuiltSlices; ++slice) pin_registers(rows[slice]);
    if constexpr (Rows::kOnesSlices != 0) pin_registers(ones);
  };
  for (int tile = 0; tile < query_tiles;) {
    int end = query_tiles;  // the loop stops before this tile
    for (; tile < end; ++tile) {
      uint32_t sums[kWgmmaSums];
      pin_rows();
      wgmma_fence();
      wgmma_and_popcount<false>(sums, rows[0], column_tile_descriptor(first_tile, tile * Rows::kSlices));
#pragma unroll
      for (int slice = 1; slice < Rows::kSlices; ++slice)
        wgmma_and_popcount<true>(sums, slice < Rows::kBuiltSlices ? rows[slice] : ones,
                                 column_tile_descriptor(first_tile, tile * Rows::kSlices + slice));
      wgmma_wait(sums);
      pin_rows();
      queue_hits<kWords>(sums, tile, first, queue, queued, end);
    }
    if (queued >= min(min_count, PartQueue<kWords>::kMaxCount + 1))
      queue.drain(search, candidates, columns, first_query, min_count == 1, queued);
  }
}

template <int kWords>
__global__ void __launch_bounds__(kBlockThreads<kWords>, 1)
    wgmma_kernel(DeviceSearch search, Candidates candidates, int groups, int query_tiles, int segments) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Rows = BitRows<kWords>;
  constexpr int kMaxQueries = kColumnBytes / (4 * Rows::kRowWords);
  __shared__ int16_t limits[kMaxQueries];
  __shared__ PartQueue<kWords> queues[kBlockThreads<kWords> / kWarpThreads];
  __shared__ volatile uint32_t lower_descriptor_of_first_tile;
  static_assert(sizeof(limits) + sizeof(queues) + sizeof(lower_descriptor_of_first_tile) <= kMaxStaticSharedBytes);
  auto* words = dynamic_shared<uint32_t>();
  words += -reinterpret_cast<uintptr_t>(words) % kColumnAlignment / sizeof(uint32_t);
  const QueryColumns<kWords> columns{words, limits};
  wait_for_previous_kernel();
  const int64_t first_query = static_cast<int64_t>(blockIdx.x % groups) * query_tiles * kWgmmaColumns;
  const int queries =
      static_cast<int>(min(static_cast<int64_t>(query_tiles) * kWgmmaColumns, search.queries.count - first_query));
  const int64_t count = search.codes.count, stride = int64_t{segments} * kRoundCodes<kWords>;
  const int warp = static_cast<int>(threadIdx.x / kWarpThreads), first_of_warp = 16 * warp;

  for (int q = threadIdx.x; q < query_tiles * kWgmmaColumns; q += kBlockThreads<kWords>) {
    if (q < queries)
      columns.store(search.queries, first_query + q, q);
    else
      columns.store_empty(q);
  }
  if (threadIdx.x == 0) lower_descriptor_of_first_tile = lower_column_tile_descriptor(words);
  int64_t first = blockIdx.x / groups * kRoundCodes<kWords>;  // the position of the round's first code
  uint32_t loaded[1][2][Rows::kLaneWords];
  Rows::load(search.codes, first + first_of_warp, count, loaded);
  unsigned queued = 0;
  int shares = 1, turn = static_cast<int>(blockIdx.x) / groups;
  for (int rounds = kFirstRounds; first < count; rounds = min(2 * rounds, kMaxRounds)) {
    __syncthreads();
    update_columns<kWords>(search, candidates, first_query, queries, first, columns);
    __syncthreads();
    const uint32_t first_tile = lower_descriptor_of_first_tile;
    // The warps of a warpgroup must execute wgmma together. Therefore all of them make the same number of iterations,
    // even if the last warps have no codes.
    for (int round = 0; round < rounds && first < count; ++round) {
      uint32_t rows[Rows::kBuiltSlices][4];
      Rows::build(loaded[0], rows);
      Rows::clear_filtered_rows(search, first + first_of_warp, count, rows);
      // Load the next codes while these are compared.
      Rows::load(search.codes, first + stride + first_of_warp, count, loaded);
      // The first time, each block publishes the margins of all its queries, because they have changed most; later of
      // a smaller share, down to one per segment. The shares rotate, so that no query depends on a single block, which
      // may start late. The block does so before the last round, so that other blocks see the margins in the next
      // update.
      if (round == rounds - 1) {
        tighten_share<kWords>(candidates, first_query, queries, turn++ % shares, shares);
        shares = min(4 * shares, segments);
      }
      // No hit may wait while the columns are updated, because a limit is valid only for codes from some position on.
      // In the round before, none waits so that the counters are complete.
      const bool adds_all = round >= rounds - 2 || first + stride >= count;
      compare<kWords>(search, candidates, columns, first_query, query_tiles, first_tile, rows, first + first_of_warp,
                      adds_all ? 1 : min_entries(round), queues[warp], queued);
      first += stride;
    }
  }
#endif
}

template <int kWords>
void launch_wgmma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  constexpr int64_t kQueryTileBytes = 4 * kQueryTileWords<kWords>;
  const int64_t all_query_tiles = ceil_div<int64_t>(search.query_count, kWgmmaColumns);
  const int64_t groups = ceil_div(all_query_tiles, kColumnBytes / kQueryTileBytes);
  const int64_t query_tiles = ceil_div(all_query_tiles, groups);
  const int64_t max_segments = std::max<int64_t>(device_attribute(cudaDevAttrMultiProcessorCount) / groups, 1);
  const int64_t segments = std::min<int64_t>(max_segments, ceil_div<int64_t>(search.code_count, kRoundCodes<kWords>));
  const LaunchShape shape{segments * groups, kBlockThreads<kWords>, query_tiles * kQueryTileBytes + kColumnAlignment, 1,
                          true};
  launch(wgmma_kernel<kWords>, shape, stream, DeviceSearch(search), candidates, static_cast<int>(groups),
         static_cast<int>(query_tiles), static_cast<int>(segments));
}

}  // namespace

bool has_hamming_scan_wgmma() {
  // The kernel is empty except in code for 9.0a, whose architecture is that of code for 9.0. The results of one
  // instruction alone take this many registers per thread.
  constexpr int kResultRegisters = 128;
  return kernel_code(wgmma_kernel<2>).registers > kResultRegisters;
}

void launch_hamming_scan_wgmma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  with_bit_rows(static_cast<int>(ceil_div<int64_t>(search.code_bytes, 4)),
                [&](auto rows) { launch_wgmma<decltype(rows)::kCodeWords>(search, candidates, stream); });
}

}  // namespace hashengine
