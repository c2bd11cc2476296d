// Candidates by Hopper's `wgmma`: a warpgroup compares 64 codes at a time, from registers, with 256 queries an
// instruction.
//
// Idea. hamming_bit_rows.cuh makes the comparison with a query's limit one bit of a sum. A block keeps the columns of
// some thousand queries in shared memory and streams its stretch of the codes past them; its warpgroups take turns at
// the matrix unit, so that it works while the others look at their sums: an OR of three a sum and a half, 68
// instructions for 128 sums of a thread. Only where the bit is set the lane looks for the sums that have it.
//
// Bounds. Codes of 128 bits or less take one instruction of 128 cycles for 64 x 256 distances, 256 bits two, 512 four,
// 1024 eight; the ORs take about 150 cycles of the block's four schedulers. The codes are read once for each group of
// queries, 8 bytes a code at 64 bits: memory is no limit from 64 queries on.
//
// Launch. Two or three warpgroups a block, one block a multiprocessor: a stretch of the codes and a group of queries.
// Of a stretch, a piece at a time, each twice as long as the last: before each, columns are brought to what limits have
// become.
//
// Limits. Codes of at most 32 words; compute capability 9.0, code for 9.0a. Elsewhere the kernel is empty.

#include <algorithm>

#include "hamming_bit_rows.cuh"
#include "hamming_hits.cuh"
#include "hamming_topk.h"
#include "launch.cuh"
#include "wgmma.cuh"

namespace hashengine {
namespace {

constexpr int kWarpgroupCodes = 64;
constexpr int64_t kColumnBytes = 192 << 10;  // of a group's queries, their distances beside them
// Core matrices of 128 bytes begin at multiples of that: PTX promises no more for other places than for these.
constexpr int64_t kColumnAlignment = 128;

// Rows of four slices and more take more registers than a third of the multiprocessor's has beside 128 sums; and as
// many instructions to a sum keep the matrix unit busy with two warpgroups.
template <int kWords>
constexpr int kWarpgroups = kWords <= 8 ? 3 : 2;
template <int kWords>
constexpr int kBlockThreads = kWarpgroups<kWords> * kWarpgroupThreads;
template <int kWords>
constexpr int kRoundCodes = kWarpgroups<kWords> * kWarpgroupCodes;  // that a block compares at a time
template <int kWords>
constexpr int64_t kFirstPiece = 4 * kRoundCodes<kWords>;
template <int kWords>
constexpr int64_t kLargestPiece = 64 * kRoundCodes<kWords>;

template <int kWords>
constexpr int kTileWords = BitRows<kWords>::kSlices * kWgmmaColumns * kSliceWords;

// Brings the columns to the limits of codes from `first` on. A thread asks for the limits of several queries at once,
// as each answer takes as long as a warpgroup's comparison of 256 queries.
template <int kWords>
__device__ __forceinline__ void update_columns(const DeviceSearch& search, const Candidates& candidates,
                                               int64_t first_query, int queries, int tiles, int64_t first,
                                               uint32_t* columns, int16_t* largest) {
  constexpr int kAtOnce = 4, kThreads = kBlockThreads<kWords>;
  const int places = tiles * kWgmmaColumns;
  for (int begin = threadIdx.x; begin < places; begin += kAtOnce * kThreads) {
    int now[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int q = begin + i * kThreads;
      now[i] = candidates.largest_distance(first_query + min(q, queries - 1), first);
      if (q >= queries) now[i] = -1;
    }
#pragma unroll 1
    for (int i = 0; i < kAtOnce; ++i) {
      const int q = begin + i * kThreads;
      if (q >= places) break;
      const int of_query = i == 0 ? now[0] : i == 1 ? now[1] : i == 2 ? now[2] : now[3];
      if (of_query == largest[q]) continue;
      largest[q] = static_cast<int16_t>(of_query);
      const int64_t query = first_query + min(q, queries - 1);
      const auto column = BitRows<kWords>::column(search.queries, query, of_query);
      for (int word = 0; word < BitRows<kWords>::kRowWords; ++word) {
        const int slice = q / kWgmmaColumns * BitRows<kWords>::kSlices + word / kSliceWords;
        columns[slice * kWgmmaColumns * kSliceWords + column_word(q % kWgmmaColumns, word % kSliceWords)] =
            column.word(search.queries, query, word);
      }
    }
  }
  publish_to_matrix_unit();
}

template <int kCount>
__device__ __forceinline__ uint32_t or_of(const uint32_t* sums) {
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) any = or3(any, sums[i], sums[i + 1]);
  return any;
}

// Queues what the sums of the codes from `first` on and of the queries from `first_query` on tell; true if there was
// any. From part to group to sum, as most often there is one or none.
template <uint32_t kCandidateBit>
__device__ __forceinline__ bool queue_passing(const DeviceSearch& search, const Candidates& candidates,
                                              int64_t first_query, int64_t first, int64_t end,
                                              const uint32_t (&sums)[kWgmmaSums], HitQueue& queue) {
  constexpr int kPart = 32, kGroup = 8;
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint32_t any[kWgmmaSums / kPart];
#pragma unroll
  for (int part = 0; part < kWgmmaSums / kPart; ++part) any[part] = or_of<kPart>(sums + kPart * part);
  if (((any[0] | any[1] | any[2] | any[3]) & kCandidateBit) == 0) return false;
#pragma unroll
  for (int part = 0; part < kWgmmaSums / kPart; ++part) {
    if ((any[part] & kCandidateBit) == 0) continue;
    uint32_t passing = 0;
#pragma unroll
    for (int group = 0; group < kPart; group += kGroup) {
      if ((or_of<kGroup>(sums + kPart * part + group) & kCandidateBit) == 0) continue;
#pragma unroll
      for (int i = group; i < group + kGroup; ++i)
        passing |= static_cast<uint32_t>((sums[kPart * part + i] & kCandidateBit) != 0) << i;
    }
    for (; passing != 0; passing &= passing - 1) {
      const int sum = kPart * part + __ffs(static_cast<int>(passing)) - 1;
      const int64_t position = first + row_of_sum(lane, sum);
      if (position < end) queue.push(search, candidates, first_query + column_of_sum(lane, sum), position);
    }
  }
  return true;
}

// Compares a warp's 16 codes from `first` on, its share of the warpgroup's 64, with all columns.
template <int kWords, typename Tile>
__device__ __forceinline__ void compare(const DeviceSearch& search, const Candidates& candidates, int64_t first_query,
                                        int tiles, Tile first_tile, uint32_t (&rows)[BitRows<kWords>::kBuilt][4],
                                        int64_t first, int64_t end, uint32_t (&sums)[kWgmmaSums], HitQueue& queue) {
  using Rows = BitRows<kWords>;
  uint32_t ones[4] = {~0u, ~0u, ~0u, ~0u};
  const auto hold_rows = [&] {
#pragma unroll
    for (int slice = 0; slice < Rows::kBuilt; ++slice) hold_registers(rows[slice]);
    if constexpr (Rows::kOnes != 0) hold_registers(ones);
  };
  for (int tile = 0; tile < tiles; ++tile) {
    hold_rows();
    wgmma_begin();
#pragma unroll
    for (int slice = 0; slice < Rows::kSlices; ++slice)
      wgmma_and_popcount(sums, slice < Rows::kBuilt ? rows[slice] : ones,
                         tile_behind(first_tile, tile * Rows::kSlices + slice), slice != 0);
    wgmma_wait(sums);
    hold_rows();
    const bool is_any = queue_passing<Rows::kCandidateBit>(search, candidates, first_query + tile * kWgmmaColumns,
                                                           first, end, sums, queue);
    if (__any_sync(kWholeWarp, is_any)) queue.drain(search, candidates, kWarpThreads);
  }
}

template <int kWords>
__global__ void __launch_bounds__(kBlockThreads<kWords>, 1)
    wgmma_kernel(DeviceSearch search, Candidates candidates, int groups, int tiles, int64_t stretch) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Rows = BitRows<kWords>;
  constexpr int kMaxQueries = kColumnBytes / (4 * Rows::kRowWords);
  __shared__ int16_t largest[kMaxQueries];
  __shared__ HitQueue queues[kBlockThreads<kWords> / 32];
  static_assert(sizeof(largest) + sizeof(queues) <= kMostDeclaredBytes);
  auto* columns = dynamic_shared<uint32_t>();
  columns += -reinterpret_cast<uintptr_t>(columns) % kColumnAlignment / sizeof(uint32_t);
  wait_for_last_kernel();
  const int64_t first_query = static_cast<int64_t>(blockIdx.x % groups) * tiles * kWgmmaColumns;
  const int queries =
      static_cast<int>(min(static_cast<int64_t>(tiles) * kWgmmaColumns, search.queries.count - first_query));
  const int64_t begin = blockIdx.x / groups * stretch, end = min(begin + stretch, search.codes.count);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);

  for (int q = threadIdx.x; q < tiles * kWgmmaColumns; q += kBlockThreads<kWords>) largest[q] = -2;  // of no column yet
  if (lane == 0) queues[warp].count = 0;
  const auto first_tile = column_tile(columns);
  int64_t size = kFirstPiece<kWords>;
  for (int64_t piece = begin; piece < end; piece += size, size = min(2 * size, kLargestPiece<kWords>)) {
    __syncthreads();
    update_columns<kWords>(search, candidates, first_query, queries, tiles, piece, columns, largest);
    __syncthreads();
    const int64_t piece_end = min(piece + size, end);
    // A warpgroup goes on as one, though its last warps may find no code of theirs.
    uint32_t words[1][2][Rows::kLaneWords], sums[kWgmmaSums] = {};
    Rows::load(search.codes, piece + warp / 4 * kWarpgroupCodes + warp % 4 * 16, piece_end, words);
    for (int64_t first = piece + warp / 4 * kWarpgroupCodes; first < piece_end; first += kRoundCodes<kWords>) {
      const int64_t own = first + warp % 4 * 16;
      uint32_t rows[Rows::kBuilt][4];
      Rows::build(words[0], rows);
      Rows::leave_out(search, own, piece_end, rows);
      Rows::load(search.codes, own + kRoundCodes<kWords>, piece_end, words);  // the next ones, while these are compared
      compare<kWords>(search, candidates, first_query, tiles, first_tile, rows, own, piece_end, sums, queues[warp]);
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
  const int64_t stretches = std::max<int64_t>(device_attribute(cudaDevAttrMultiProcessorCount) / groups, 1);
  const int64_t stretch = round_up(ceil_div(search.code_count, stretches), kRoundCodes<kWords>);
  const LaunchShape shape{ceil_div(search.code_count, stretch) * groups, kBlockThreads<kWords>,
                          tiles * kTileBytes + kColumnAlignment, 1, true};
  launch(wgmma_kernel<kWords>, shape, stream, DeviceSearch(search), candidates, static_cast<int>(groups),
         static_cast<int>(tiles), stretch);
}

}  // namespace

bool has_hamming_scan_wgmma() {
  cudaFuncAttributes attributes{};
  // The empty kernel declares no shared memory.
  return cudaFuncGetAttributes(&attributes, wgmma_kernel<2>) == cudaSuccess && attributes.sharedSizeBytes > 0;
}

void launch_hamming_scan_wgmma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  with_bit_rows(static_cast<int>(ceil_div<int64_t>(search.code_bytes, 4)),
                [&](auto rows) { launch_wgmma<decltype(rows)::kCodeWords>(search, candidates, stream); });
}

}  // namespace hashengine
