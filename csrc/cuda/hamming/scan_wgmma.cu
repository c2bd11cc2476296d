// The scan for candidates with Hopper's `wgmma`: one instruction of a warpgroup compares 64 codes, held in registers,
// with 256 queries.
//
// Idea. bit_rows.cuh turns the comparison with a query's maximum distance into one bit of a sum. A block keeps the
// columns of up to 6,144 queries of 64 bits in shared memory and streams its segment of the codes past them. Its
// warpgroups take turns: one uses the matrix unit while the others check their sums. A three-input OR checks two sums,
// so a thread checks its 128 sums with 68 instructions. If the OR of all its sums lacks the bit, the thread does not
// look at the single sums.
//
// Time. 64 x 256 distances need one matrix instruction for codes of up to 128 bits, two for 256 bits, four for 512 bits
// and eight for 1,024 bits. An instruction takes 128 cycles; the ORs take about 150 cycles of the SM's four schedulers.
// The codes are read once per group of queries, 8 bytes per code of 64 bits. Memory is not the bottleneck.
//
// Launch. Two or three warpgroups per block, one block per SM; each block has a segment of the codes and a group of
// queries. It processes the segment in chunks, each twice as long as the one before, and updates the columns before
// each chunk.
//
// Limits. Codes of at most kMaxMatrixWords words; compute capability 9.0, compiled for 9.0a. Elsewhere the kernel is
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
// Core matrices are 128 bytes long. PTX specifies their layout only for addresses that are multiples of 128.
constexpr int64_t kColumnAlignment = 128;

// A warpgroup whose rows have four or more slices needs more than a third of the SM's registers, including 128 sums per
// thread. Such rows take at least four matrix instructions per sum, so two warpgroups suffice to keep the matrix unit
// busy.
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

template <int kWords>
constexpr int kTileWords = BitRows<kWords>::kSlices * kWgmmaColumns * kSliceWords;

// Updates the columns to the maximum distances of codes at position `first` or later. A thread loads the bounds of
// several queries at a time, because the latency of a load is as long as a warpgroup's comparison with 256 queries.
template <int kWords>
__device__ __forceinline__ void update_columns(const DeviceSearch& search, const Candidates& candidates,
                                               int64_t first_query, int queries, int tiles, int64_t first,
                                               uint32_t* columns, int16_t* max_distances) {
  constexpr int kQueries = 4, kThreads = kBlockThreads<kWords>;
  const int column_count = tiles * kWgmmaColumns;
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
      // An index that is not a constant would move the array to local memory.
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

template <int kCount>
__device__ __forceinline__ uint32_t or_all(const uint32_t* sums) {
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) any = or3(any, sums[i], sums[i + 1]);
  return any;
}

// Queues the hits among the sums of the codes from position `first` on and the queries from `first_query` on. Returns
// whether any sum has the candidate bit. Usually at most one has it, so the function checks quarters of the sums first,
// then groups in a quarter, then the sums of a group.
template <uint32_t kCandidateBit>
__device__ __forceinline__ bool queue_hits(const DeviceSearch& search, const Candidates& candidates,
                                           int64_t first_query, int64_t first, int64_t end,
                                           const uint32_t (&sums)[kWgmmaSums], HitQueue& queue) {
  constexpr int kQuarter = 32, kGroup = 8;  // numbers of sums
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint32_t any[kWgmmaSums / kQuarter];
#pragma unroll
  for (int quarter = 0; quarter < kWgmmaSums / kQuarter; ++quarter)
    any[quarter] = or_all<kQuarter>(sums + kQuarter * quarter);
  if (((any[0] | any[1] | any[2] | any[3]) & kCandidateBit) == 0) return false;
#pragma unroll
  for (int quarter = 0; quarter < kWgmmaSums / kQuarter; ++quarter) {
    if ((any[quarter] & kCandidateBit) == 0) continue;
    uint32_t hits = 0;  // one bit per sum
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

// Compares the warp's 16 codes, from position `first` on, with all columns. The four warps of a warpgroup must call
// together, each with 16 of the warpgroup's 64 codes.
template <int kWords, typename Tile>
__device__ __forceinline__ void compare(const DeviceSearch& search, const Candidates& candidates, int64_t first_query,
                                        int tiles, Tile first_tile, uint32_t (&rows)[BitRows<kWords>::kBuiltSlices][4],
                                        int64_t first, int64_t end, uint32_t (&sums)[kWgmmaSums], HitQueue& queue) {
  using Rows = BitRows<kWords>;
  uint32_t ones[4] = {~0u, ~0u, ~0u, ~0u};
  const auto pin_rows = [&] {
#pragma unroll
    for (int slice = 0; slice < Rows::kBuiltSlices; ++slice) pin_registers(rows[slice]);
    if constexpr (Rows::kOnesSlices != 0) pin_registers(ones);
  };
  for (int tile = 0; tile < tiles; ++tile) {
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
    wgmma_kernel(DeviceSearch search, Candidates candidates, int groups, int tiles, int64_t segment_codes) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Rows = BitRows<kWords>;
  constexpr int kMaxQueries = kColumnBytes / (4 * Rows::kRowWords), kNoColumn = -2;
  __shared__ int16_t max_distances[kMaxQueries];
  __shared__ HitQueue queues[kBlockThreads<kWords> / 32];
  static_assert(sizeof(max_distances) + sizeof(queues) <= kMaxStaticSharedBytes);
  auto* columns = dynamic_shared<uint32_t>();
  columns += -reinterpret_cast<uintptr_t>(columns) % kColumnAlignment / sizeof(uint32_t);
  wait_for_previous_kernel();
  const int64_t first_query = static_cast<int64_t>(blockIdx.x % groups) * tiles * kWgmmaColumns;
  const int queries =
      static_cast<int>(min(static_cast<int64_t>(tiles) * kWgmmaColumns, search.queries.count - first_query));
  const int64_t begin = blockIdx.x / groups * segment_codes, end = min(begin + segment_codes, search.codes.count);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);

  for (int q = threadIdx.x; q < tiles * kWgmmaColumns; q += kBlockThreads<kWords>) max_distances[q] = kNoColumn;
  if (lane == 0) queues[warp].count = 0;
  const auto first_tile = column_tile_descriptor(columns);
  int64_t chunk_codes = kFirstChunk<kWords>;
  for (int64_t chunk = begin; chunk < end;
       chunk += chunk_codes, chunk_codes = min(2 * chunk_codes, kMaxChunk<kWords>)) {
    __syncthreads();
    update_columns<kWords>(search, candidates, first_query, queries, tiles, chunk, columns, max_distances);
    __syncthreads();
    const int64_t chunk_end = min(chunk + chunk_codes, end);
    // The warps of a warpgroup must execute wgmma together. Therefore the loop bound is the same for all of them, even
    // if the last warps have no codes.
    uint32_t words[1][2][Rows::kLaneWords], sums[kWgmmaSums] = {};
    Rows::load(search.codes, chunk + warp / 4 * kWarpgroupCodes + warp % 4 * 16, chunk_end, words);
    for (int64_t first = chunk + warp / 4 * kWarpgroupCodes; first < chunk_end; first += kRoundCodes<kWords>) {
      const int64_t warp_first = first + warp % 4 * 16;
      uint32_t rows[Rows::kBuiltSlices][4];
      Rows::build(words[0], rows);
      Rows::clear_filtered_rows(search, warp_first, chunk_end, rows);
      // Prefetch the next codes while these are compared.
      Rows::load(search.codes, warp_first + kRoundCodes<kWords>, chunk_end, words);
      compare<kWords>(search, candidates, first_query, tiles, first_tile, rows, warp_first, chunk_end, sums,
                      queues[warp]);
    }
  }
  queues[warp].drain(search, candidates, 1);
#endif
}

template <int kWords>
void launch_wgmma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  constexpr int64_t kTileBytes = 4 * kTileWords<kWords>;
  const int64_t all_tiles = ceil_div<int64_t>(search.query_count, kWgmmaColumns);
  const int64_t groups = ceil_div(all_tiles, kColumnBytes / kTileBytes);
  const int64_t tiles = ceil_div(all_tiles, groups);
  const int64_t segments = std::max<int64_t>(device_attribute(cudaDevAttrMultiProcessorCount) / groups, 1);
  const int64_t segment_codes = round_up(ceil_div(search.code_count, segments), kRoundCodes<kWords>);
  const LaunchShape shape{ceil_div(search.code_count, segment_codes) * groups, kBlockThreads<kWords>,
                          tiles * kTileBytes + kColumnAlignment, 1, true};
  launch(wgmma_kernel<kWords>, shape, stream, DeviceSearch(search), candidates, static_cast<int>(groups),
         static_cast<int>(tiles), segment_codes);
}

}  // namespace

bool has_hamming_scan_wgmma() {
  cudaFuncAttributes attributes{};
  // Only the kernel for 9.0a declares shared memory; the others are empty.
  return cudaFuncGetAttributes(&attributes, wgmma_kernel<2>) == cudaSuccess && attributes.sharedSizeBytes > 0;
}

void launch_hamming_scan_wgmma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  with_bit_rows(static_cast<int>(ceil_div<int64_t>(search.code_bytes, 4)),
                [&](auto rows) { launch_wgmma<decltype(rows)::kCodeWords>(search, candidates, stream); });
}

}  // namespace hashengine
