// The scan that finds candidates with Hopper's matrix instruction `wgmma`. A warpgroup (four warps) holds 64 codes in
// registers and compares them with 256 queries at a time.
//
// Idea. bit_rows.cuh writes codes as rows and queries as columns of 1-bit matrices. The matrix instructions compute one
// sum per code and query. The candidate bit of a sum is set if the code is within the query's maximum distance. A block
// keeps the columns of its queries in shared memory (up to 6,144 queries of 64 bits) and compares all codes of its
// segment with them. While one of its warpgroups uses the matrix unit, the others check their sums. A three-input OR
// checks two sums, so a thread checks its 128 sums with about 68 instructions. If the OR of all its sums lacks the
// candidate bit, the thread does not look at each sum.
//
// Time (estimated). 64 x 256 distances need one matrix instruction for codes of up to 128 bits, two for 256 bits, four
// for 512 bits and eight for 1,024 bits. An instruction takes 128 cycles. The ORs occupy each of the SM's four
// schedulers for about 150 cycles. The codes are read once per group of queries, 8 bytes per code of 64 bits. Memory is
// not the bottleneck.
//
// Launch. Two or three warpgroups per block, one block per SM. Each block has a segment of the codes and a group of
// queries. It processes the segment in chunks and updates the columns before each chunk. Each chunk is twice as long as
// the one before, up to kMaxChunk.
//
// Limits. Codes of at most kMaxMatrixWords words. Compute capability 9.0, in code for 9.0a; in other code the kernel is
// empty.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/hamming/bit_rows.cuh"
#include "cuda/hamming/hit_queue.cuh"
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
template <int kWords>
constexpr int64_t kFirstChunk = 4 * kRoundCodes<kWords>;
template <int kWords>
constexpr int64_t kMaxChunk = 64 * kRoundCodes<kWords>;

// A query tile is the columns of 256 queries: kSlices column tiles (bit_matrix.cuh), one after another.
template <int kWords>
constexpr int kQueryTileWords = BitRows<kWords>::kSlices * kWgmmaColumns * kSliceWords;

// Updates the columns of the queries whose maximum distance has changed. Codes at position `first` or later will be
// compared with these columns. A thread loads the bounds of several queries at a time, because one load has a latency
// of about the time in which a warpgroup compares its codes with 256 queries (estimated).
template <int kWords>
__device__ __forceinline__ void update_columns(const DeviceSearch& search, const Candidates& candidates,
                                               int64_t first_query, int queries, int query_tiles, int64_t first,
                                               uint32_t* columns, int16_t* max_distances) {
  constexpr int kQueries = 4, kThreads = kBlockThreads<kWords>;
  const int column_count = query_tiles * kWgmmaColumns;
  for (int begin = threadIdx.x; begin < column_count; begin += kQueries * kThreads) {
    int updated[kQueries];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const int q = begin + i * kThreads;
      updated[i] = candidates.max_distance(first_query + min(q, queries - 1), first);
      if (q >= queries) updated[i] = -1;
    }
#pragma unroll 1
    for (int i = 0; i < kQueries; ++i) {
      const int q = begin + i * kThreads;
      if (q >= column_count) break;
      // A variable index would move the array `updated` to local memory.
      const int max_distance = i == 0 ? updated[0] : i == 1 ? updated[1] : i == 2 ? updated[2] : updated[3];
      if (max_distance == max_distances[q]) continue;
      max_distances[q] = static_cast<int16_t>(max_distance);
      const int64_t query = first_query + min(q, queries - 1);
      const auto column = BitRows<kWords>::column(search.queries, query, max_distance);
      for (int word = 0; word < BitRows<kWords>::kRowWords; ++word) {
        const int slice = q / kWgmmaColumns * BitRows<kWords>::kSlices + word / kSliceWords;
        columns[slice * kWgmmaColumns * kSliceWords + column_word(q % kWgmmaColumns, word % kSliceWords)] =
            column.word(search.queries, query, word);
      }
    }
  }
  fence_matrix_reads();
}

// The OR of kCount sums; kCount is even.
template <int kCount>
__device__ __forceinline__ uint32_t or_all(const uint32_t* sums) {
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) any = or3(any, sums[i], sums[i + 1]);
  return any;
}

// Queues the hits among a lane's sums. The first row is the code at position `first`, and the first column is the query
// `first_query`. Returns whether any sum has the candidate bit. Usually at most one sum has it. Therefore the function
// checks quarters of the sums first, then the groups of a quarter, then the sums of a group.
template <uint32_t kCandidateBit>
__device__ __forceinline__ bool queue_hits(const DeviceSearch& search, const Candidates& candidates,
                                           int64_t first_query, int64_t first, int64_t end,
                                           const uint32_t (&sums)[kWgmmaSums], HitQueue& queue) {
  constexpr int kQuarter = 32, kGroup = 8;  // sums per quarter and per group
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint32_t any[kWgmmaSums / kQuarter];
#pragma unroll
  for (int quarter = 0; quarter < kWgmmaSums / kQuarter; ++quarter)
    any[quarter] = or_all<kQuarter>(sums + kQuarter * quarter);
  if (((any[0] | any[1] | any[2] | any[3]) & kCandidateBit) == 0) return false;
#pragma unroll
  for (int quarter = 0; quarter < kWgmmaSums / kQuarter; ++quarter) {
    if ((any[quarter] & kCandidateBit) == 0) continue;
    uint32_t hits = 0;  // one bit per sum of the quarter
#pragma unroll
    for (int group = 0; group < kQuarter; group += kGroup) {
      if ((or_all<kGroup>(sums + kQuarter * quarter + group) & kCandidateBit) == 0) continue;
#pragma unroll
      for (int i = group; i < group + kGroup; ++i)
        hits |= static_cast<uint32_t>((sums[kQuarter * quarter + i] & kCandidateBit) != 0) << i;
    }
    for (; hits != 0; hits &= hits - 1) {
      const int sum = kQuarter * quarter + __ffs(static_cast<int>(hits)) - 1;
      const int64_t position = first + row_of_sum(lane, sum);
      if (position < end) queue.push(search, candidates, first_query + column_of_sum(lane, sum), position);
    }
  }
  return true;
}

// Compares the warp's 16 codes, which start at position `first`, with all columns. Queues the hits. The four warps of a
// warpgroup must call together, each with its 16 of the warpgroup's 64 codes.
template <int kWords, typename Tile>
__device__ __forceinline__ void compare(const DeviceSearch& search, const Candidates& candidates, int64_t first_query,
                                        int query_tiles, Tile first_tile,
                                        uint32_t (&rows)[BitRows<kWords>::kBuiltSlices][4], int64_t first, int64_t end,
                                        uint32_t (&sums)[kWgmmaSums], HitQueue& queue) {
  using Rows = BitRows<kWords>;
  uint32_t ones[4] = {~0u, ~0u, ~0u, ~0u};
  const auto pin_rows = [&] {
#pragma unroll
    for (int slice = 0; slice < Rows::kBuiltSlices; ++slice) pin_registers(rows[slice]);
    if constexpr (Rows::kOnesSlices != 0) pin_registers(ones);
  };
  for (int tile = 0; tile < query_tiles; ++tile) {
    pin_rows();
    wgmma_fence();
#pragma unroll
    for (int slice = 0; slice < Rows::kSlices; ++slice)
      wgmma_and_popcount(sums, slice < Rows::kBuiltSlices ? rows[slice] : ones,
                         advance_tiles(first_tile, tile * Rows::kSlices + slice), slice != 0);
    wgmma_wait(sums);
    pin_rows();
    const bool has_hits = queue_hits<Rows::kCandidateBit>(search, candidates, first_query + tile * kWgmmaColumns, first,
                                                          end, sums, queue);
    if (__any_sync(kWholeWarp, has_hits)) queue.drain(search, candidates, kWarpThreads);
  }
}

template <int kWords>
__global__ void __launch_bounds__(kBlockThreads<kWords>, 1)
    wgmma_kernel(DeviceSearch search, Candidates candidates, int groups, int query_tiles, int64_t segment_codes) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Rows = BitRows<kWords>;
  constexpr int kMaxQueries = kColumnBytes / (4 * Rows::kRowWords);
  constexpr int kNoColumn = -2;  // not a maximum distance: the first update stores every column
  __shared__ int16_t max_distances[kMaxQueries];
  __shared__ HitQueue queues[kBlockThreads<kWords> / 32];
  static_assert(sizeof(max_distances) + sizeof(queues) <= kMaxStaticSharedBytes);
  auto* columns = dynamic_shared<uint32_t>();
  columns += -reinterpret_cast<uintptr_t>(columns) % kColumnAlignment / sizeof(uint32_t);
  wait_for_previous_kernel();
  const int64_t first_query = static_cast<int64_t>(blockIdx.x % groups) * query_tiles * kWgmmaColumns;
  const int queries =
      static_cast<int>(min(static_cast<int64_t>(query_tiles) * kWgmmaColumns, search.queries.count - first_query));
  const int64_t begin = blockIdx.x / groups * segment_codes, end = min(begin + segment_codes, search.codes.count);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);

  for (int q = threadIdx.x; q < query_tiles * kWgmmaColumns; q += kBlockThreads<kWords>) max_distances[q] = kNoColumn;
  if (lane == 0) queues[warp].count = 0;
  const auto first_tile = column_tile_descriptor(columns);
  int64_t chunk_codes = kFirstChunk<kWords>;
  for (int64_t chunk = begin; chunk < end;
       chunk += chunk_codes, chunk_codes = min(2 * chunk_codes, kMaxChunk<kWords>)) {
    __syncthreads();
    update_columns<kWords>(search, candidates, first_query, queries, query_tiles, chunk, columns, max_distances);
    __syncthreads();
    const int64_t chunk_end = min(chunk + chunk_codes, end);
    uint32_t words[1][2][Rows::kLaneWords], sums[kWgmmaSums] = {};
    Rows::load(search.codes, chunk + warp / 4 * kWarpgroupCodes + warp % 4 * 16, chunk_end, words);
    // The warps of a warpgroup must execute wgmma together. Therefore all of them make the same number of iterations,
    // even if the last warps have no codes.
    for (int64_t first = chunk + warp / 4 * kWarpgroupCodes; first < chunk_end; first += kRoundCodes<kWords>) {
      const int64_t warp_first = first + warp % 4 * 16;
      uint32_t rows[Rows::kBuiltSlices][4];
      Rows::build(words[0], rows);
      Rows::clear_filtered_rows(search, warp_first, chunk_end, rows);
      // Load the next codes while these are compared.
      Rows::load(search.codes, warp_first + kRoundCodes<kWords>, chunk_end, words);
      compare<kWords>(search, candidates, first_query, query_tiles, first_tile, rows, warp_first, chunk_end, sums,
                      queues[warp]);
    }
  }
  queues[warp].drain(search, candidates, 1);
#endif
}

template <int kWords>
void launch_wgmma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  constexpr int64_t kQueryTileBytes = 4 * kQueryTileWords<kWords>;
  const int64_t all_query_tiles = ceil_div<int64_t>(search.query_count, kWgmmaColumns);
  const int64_t groups = ceil_div(all_query_tiles, kColumnBytes / kQueryTileBytes);
  const int64_t query_tiles = ceil_div(all_query_tiles, groups);
  const int64_t segments = std::max<int64_t>(device_attribute(cudaDevAttrMultiProcessorCount) / groups, 1);
  const int64_t segment_codes = round_up(ceil_div(search.code_count, segments), kRoundCodes<kWords>);
  const LaunchShape shape{ceil_div(search.code_count, segment_codes) * groups, kBlockThreads<kWords>,
                          query_tiles * kQueryTileBytes + kColumnAlignment, 1, true};
  launch(wgmma_kernel<kWords>, shape, stream, DeviceSearch(search), candidates, static_cast<int>(groups),
         static_cast<int>(query_tiles), segment_codes);
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
