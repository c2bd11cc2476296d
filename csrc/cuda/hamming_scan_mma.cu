// Candidates by `mma`: a warp compares 16 to 64 codes at a time, from registers, with every column of its block's queries.
//
// Idea. hamming_bit_rows.cuh makes the comparison with a query's limit one bit of a sum. Queries lie in shared memory in
// the order in which lanes want them: 8 bytes a lane are eight columns, for all the warp's codes. A lane's sums of
// eight columns are ORed; only where the bit is set the lane looks at them one by one.
//
// Traffic. The codes are read once for up to 1,024 queries (of 128 bits or less; 32 KB of columns): 8 bytes a code at 64
// bits. With 2 to 32 queries that read is the floor and the limit; with many the limit is the matrix unit, or on Hopper,
// whose `mma` runs below the rate of `wgmma`, that.
//
// Launch. 256 threads a block, each block a stretch of the codes and a group of queries. Of a stretch, a piece at a time,
// each twice as long as the last: before each, columns are brought to what limits have become.
//
// Limits. Codes of at most 32 words; compute capability 8.0 to 9.0. For later ones the kernel is empty.

#include <algorithm>

#include "hamming_bit_rows.cuh"
#include "hamming_hits.cuh"
#include "hamming_topk.h"
#include "launch.cuh"

namespace hashengine {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kWarps = kBlockThreads / 32;
constexpr int kColumnBytes = 32 << 10;          // of a group's queries
constexpr int kBlocksAMultiprocessor = 4;
// Codes, multiples of what a block's warps take at once.
[[maybe_unused]] constexpr int64_t kFirstPiece = 4 * 64 * kWarps, kLargestPiece = 64 * 64 * kWarps;

template <int kWords>
constexpr int kMaxGroup = kColumnBytes / (4 * BitRows<kWords>::kRowWords);  // queries

// Tiles of 16 codes that a warp has in registers at once: as many as keep enough loads under way.
template <int kWords>
constexpr int kTiles = kWords <= 4 ? 4 : kWords <= 16 ? 2 : 1;

// What a lane has read of its warp's codes.
template <int kWords>
using LaneWords = uint32_t[kTiles<kWords>][2][BitRows<kWords>::kLaneWords];

template <int kWords>
struct Rows {
  uint32_t tiles[kTiles<kWords>][BitRows<kWords>::kBuilt][4];

  explicit __device__ __forceinline__ Rows(const LaneWords<kWords>& words) {
#pragma unroll
    for (int i = 0; i < kTiles<kWords>; ++i) {
      BitRows<kWords>::build(words[i], tiles[i]);
#pragma unroll
      for (int slice = 0; slice < BitRows<kWords>::kBuilt; ++slice) hold_registers(tiles[i][slice]);
    }
  }
};

// Columns of eight, slice by slice: lane 4g + t finds words t and t + 4 of column g side by side.
template <int kWords>
__device__ __forceinline__ int word_place(int query, int word) {
  const int slice = word / kSliceWords, lane = query % 8 * 4 + word % 4;
  return ((query / 8 * BitRows<kWords>::kSlices + slice) * 32 + lane) * 2 + word % kSliceWords / 4;
}

// Brings the columns to the limits of codes from `first` on.
template <int kWords>
__device__ __forceinline__ void update_columns(const DeviceSearch& search, const Candidates& candidates,
                                               int64_t first_query, int queries, int group, int64_t first,
                                               uint32_t* columns, int* largest) {
  for (int q = threadIdx.x; q < group; q += kBlockThreads) {
    const int64_t query = first_query + q;
    const int now = q < queries ? candidates.largest_distance(query, first) : -1;
    if (now == largest[q]) continue;
    largest[q] = now;
    const auto column = BitRows<kWords>::column(search.queries, min(query, search.queries.count - 1), now);
    for (int word = 0; word < BitRows<kWords>::kRowWords; ++word)
      columns[word_place<kWords>(q, word)] = column.word(search.queries, query, word);
  }
}

// Compares the warp's codes, sixteen a tile, with all columns and offers what passes.
template <int kWords>
__device__ __forceinline__ void compare(const DeviceSearch& search, const Candidates& candidates, int64_t first_query,
                                        int group, const uint32_t* columns, const Rows<kWords>& rows, int64_t first,
                                        int64_t end, HitQueue& queue) {
  constexpr uint32_t kCandidateBit = BitRows<kWords>::kCandidateBit;
  constexpr int kSlices = BitRows<kWords>::kSlices;
  constexpr uint32_t kOnes[4] = {~0u, ~0u, ~0u, ~0u};
  const int lane = static_cast<int>(threadIdx.x % 32);
  bool is_any = false;
  for (int q = 0; q < group; q += 8) {
    uint32_t sums[kTiles<kWords>][4] = {};
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const uint2 pair = *reinterpret_cast<const uint2*>(columns + ((q / 8 * kSlices + slice) * 32 + lane) * 2);
      const uint32_t words[2] = {pair.x, pair.y};
#pragma unroll
      for (int tile = 0; tile < kTiles<kWords>; ++tile)
        mma_and_popcount(sums[tile], slice < BitRows<kWords>::kBuilt ? rows.tiles[tile][slice] : kOnes, words,
                         sums[tile]);
    }
    uint32_t any = 0;
#pragma unroll
    for (int tile = 0; tile < kTiles<kWords>; ++tile)
      any = or3(or3(any, sums[tile][0], sums[tile][1]), sums[tile][2], sums[tile][3]);
    unsigned passing = 0;
    if (any & kCandidateBit) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles<kWords>; ++i)
        passing |= static_cast<unsigned>((sums[i / 4][i % 4] & kCandidateBit) != 0) << i;
    }
    for (; passing != 0; passing &= passing - 1) {
      const int i = __ffs(static_cast<int>(passing)) - 1;
      const int64_t position = first + i / 4 * 16 + row_of_sum(lane, i % 4);
      if (position < end) queue.push(search, candidates, first_query + q + column_of_sum(lane, i % 4), position);
      is_any = true;
    }
    __syncwarp();
  }
  if (__any_sync(kWholeWarp, is_any)) queue.drain(search, candidates, kWarpThreads);
}

template <int kWords>
__global__ void __launch_bounds__(kBlockThreads, kWords <= 8 ? 3 : kWords <= 16 ? 2 : 1)
    mma_kernel(DeviceSearch search, Candidates candidates, int groups, int group, int64_t stretch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1000
  constexpr int kWarpCodes = 16 * kTiles<kWords>;
  auto* columns = dynamic_shared<uint32_t>();
  __shared__ int largest[kMaxGroup<kWords>];
  __shared__ HitQueue queues[kWarps];
  wait_for_last_kernel();
  const int64_t first_query = static_cast<int64_t>(blockIdx.x % groups) * group;
  const int queries = static_cast<int>(min(static_cast<int64_t>(group), search.queries.count - first_query));
  const int64_t begin = blockIdx.x / groups * stretch, end = min(begin + stretch, search.codes.count);
  const int warp = static_cast<int>(threadIdx.x / 32);

  for (int q = threadIdx.x; q < group; q += kBlockThreads) largest[q] = -2;  // of no column yet
  if (threadIdx.x % 32 == 0) queues[warp].count = 0;
  int64_t size = kFirstPiece;
  for (int64_t piece = begin; piece < end; piece += size, size = min(2 * size, kLargestPiece)) {
    __syncthreads();
    update_columns<kWords>(search, candidates, first_query, queries, group, piece, columns, largest);
    __syncthreads();
    const int64_t piece_end = min(piece + size, end);
    LaneWords<kWords> words;
    BitRows<kWords>::load(search.codes, piece + warp * kWarpCodes, piece_end, words);
    for (int64_t first = piece + warp * kWarpCodes; first < piece_end; first += kWarps * kWarpCodes) {
      const Rows<kWords> rows(words);
      // The next ones come while these are compared.
      BitRows<kWords>::load(search.codes, first + kWarps * kWarpCodes, piece_end, words);
      compare<kWords>(search, candidates, first_query, group, columns, rows, first, piece_end, queues[warp]);
    }
  }
  queues[warp].drain(search, candidates, 1);
#endif
}

template <int kWords>
void launch_mma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  const int64_t groups = ceil_div<int64_t>(search.query_count, kMaxGroup<kWords>);
  const int64_t group = round_up(ceil_div(search.query_count, groups), 8);
  const int64_t wanted = device_attribute(cudaDevAttrMultiProcessorCount) * kBlocksAMultiprocessor;
  const int64_t stretch = round_up(ceil_div(search.code_count, std::max<int64_t>(wanted / groups, 1)), 64 * kWarps);
  const LaunchShape shape{ceil_div(search.code_count, stretch) * groups, kBlockThreads,
                          group * BitRows<kWords>::kRowWords * 4, 1, true};
  launch(mma_kernel<kWords>, shape, stream, DeviceSearch(search), candidates, static_cast<int>(groups),
         static_cast<int>(group), stretch);
}

}  // namespace

void launch_hamming_scan_mma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  with_bit_rows(static_cast<int>(ceil_div<int64_t>(search.code_bytes, 4)),
                [&](auto rows) { launch_mma<decltype(rows)::kCodeWords>(search, candidates, stream); });
}

}  // namespace hashengine
