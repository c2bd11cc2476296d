// Candidates by `mma`: a warp compares 16 to 64 codes at a time, from registers, with every column of its block's
// queries.
//
// Idea. With the row [d, ~d] and the column [q, ~q] of b bits each, zeros behind a code included, a sum counts what
// agrees: b - distance. It begins with b + T, T the largest distance at which the query has candidates, so that the bit
// of the value 2b is set where distance <= T. A limit that moves changes that beginning and nothing else. Of a column
// the lanes load q and make ~q themselves. A lane's sums of eight columns are ORed; only where the bit is set the lane
// looks at them one by one.
//
// Traffic. The codes are read once for up to 2,048 queries of 64 bits (16 KB of columns), 8 bytes a code. That read is
// the floor of 2 to 32 queries; eight queries of 64 bits take a warp about 40 instructions for 64 codes, so that with
// 32 of them instructions are the limit. With many it is the matrix unit.
//
// Launch. 256 threads a block, each block a stretch of the codes and a group of queries. Of a stretch, a piece at a
// time, each twice as long as the last: before each, sums' beginnings are brought to what limits have become.
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
constexpr int kColumnBytes = 16 << 10;  // of a group's queries
constexpr int kBlocksAMultiprocessor = 4;
// Codes, multiples of what a block's warps take at once.
[[maybe_unused]] constexpr int64_t kFirstPiece = 4 * 64 * kWarps, kLargestPiece = 64 * 64 * kWarps;

// A slice is what one instruction takes: four words of a code and their complements, or two of each.
template <int kWords>
constexpr int kSlices = kWords == 2 ? 1 : kWords / 4;
template <int kWords>
constexpr int kSliceRows = kWords == 2 ? 2 : 4;  // words of a row pair that a lane holds
template <int kWords>
constexpr int kMaxGroup = kColumnBytes / (16 * kSlices<kWords>);  // queries

// Tiles of 16 codes that a warp has in registers at once: as many as keep enough loads under way.
template <int kWords>
constexpr int kTiles = kWords <= 4    ? 4
                       : kWords <= 16 ? 2
                                      : 1;

// What a lane has read of its warp's codes.
template <int kWords>
using LaneWords = uint32_t[kTiles<kWords>][2][BitRows<kWords>::kLaneWords];

template <int kWords>
struct Rows {
  uint32_t tiles[kTiles<kWords>][kSlices<kWords>][kSliceRows<kWords>];

  __device__ __forceinline__ Rows(const DeviceSearch& search, const LaneWords<kWords>& words, int64_t first,
                                  int64_t end) {
    // Of two words, the lanes 4g + 2 and 4g + 3 have the complements.
    const uint32_t flip = kWords == 2 && threadIdx.x % 4 >= 2 ? ~0u : 0;
#pragma unroll
    for (int tile = 0; tile < kTiles<kWords>; ++tile) {
#pragma unroll
      for (int slice = 0; slice < kSlices<kWords>; ++slice) {
#pragma unroll
        for (int i = 0; i < kSliceRows<kWords>; ++i)
          tiles[tile][slice][i] = i < 2 ? words[tile][i][slice] ^ flip : ~words[tile][i - 2][slice];
      }
      BitRows<kWords>::leave_out(search, first + 16 * tile, end, tiles[tile]);
#pragma unroll
      for (int slice = 0; slice < kSlices<kWords>; ++slice) hold_registers(tiles[tile][slice]);
    }
  }
};

// Columns of eight, slice by slice: lane 4g + t finds word t of column g.
template <int kWords>
__device__ __forceinline__ void write_columns(const CodeRows& queries, int64_t first_query, int group,
                                              uint32_t* columns) {
  for (int i = threadIdx.x; i < group * kSlices<kWords> * 4; i += kBlockThreads) {
    const int t = i % 4, q = i / 4 % 8 + i / (32 * kSlices<kWords>)*8, slice = i / 32 % kSlices<kWords>;
    const int word = kWords == 2 ? t % 2 : 4 * slice + t;
    const int64_t query = min(first_query + q, queries.count - 1);
    const uint32_t code = word < queries.words() ? queries.word(query, word) : 0;
    columns[i] = kWords == 2 && t >= 2 ? ~code : code;
  }
}

// Compares the warp's codes, sixteen a tile, with all columns and queues what passes.
template <int kWords>
__device__ __forceinline__ void compare(const DeviceSearch& search, const Candidates& candidates, int64_t first_query,
                                        int group, const uint32_t* columns, const uint32_t* begin,
                                        const Rows<kWords>& rows, int64_t first, int64_t end, HitQueue& queue) {
  constexpr uint32_t kCandidateBit = 64 * kWords;
  const int lane = static_cast<int>(threadIdx.x % 32);
  bool is_any = false;
  for (int q = 0; q < group; q += 8) {
    const uint2 pair = *reinterpret_cast<const uint2*>(begin + q + 2 * (lane % 4));
    uint32_t begins[4] = {pair.x, pair.y, pair.x, pair.y}, sums[kTiles<kWords>][4];
#pragma unroll
    for (int slice = 0; slice < kSlices<kWords>; ++slice) {
      const uint32_t word = columns[(q / 8 * kSlices<kWords> + slice) * 32 + lane];
      uint32_t column[kSliceRows<kWords> / 2];
#pragma unroll
      for (int i = 0; i < kSliceRows<kWords> / 2; ++i) column[i] = i == 0 ? word : ~word;
#pragma unroll
      for (int tile = 0; tile < kTiles<kWords>; ++tile)
        mma_and_popcount(sums[tile], rows.tiles[tile][slice], column, slice == 0 ? begins : sums[tile]);
    }
    uint32_t any = 0;
#pragma unroll
    for (int tile = 0; tile < kTiles<kWords>; ++tile)
      any = or3(or3(any, sums[tile][0], sums[tile][1]), sums[tile][2], sums[tile][3]);
    if (any & kCandidateBit) {
      unsigned passing = 0;
#pragma unroll
      for (int i = 0; i < 4 * kTiles<kWords>; ++i)
        passing |= static_cast<unsigned>((sums[i / 4][i % 4] & kCandidateBit) != 0) << i;
      for (; passing != 0; passing &= passing - 1) {
        const int i = __ffs(static_cast<int>(passing)) - 1;
        const int64_t query = first_query + q + column_of_sum(lane, i % 4);
        const int64_t position = first + i / 4 * 16 + row_of_sum(lane, i % 4);
        if (position < end && search.may_find(query, position)) queue.push(search, candidates, query, position);
      }
      is_any = true;
    }
    __syncwarp();
  }
  if (__any_sync(kWholeWarp, is_any)) queue.drain(search, candidates, kWarpThreads);
}

template <int kWords>
__global__ void __launch_bounds__(kBlockThreads, kWords <= 8    ? 3
                                                 : kWords <= 16 ? 2
                                                                : 1)
    mma_kernel(DeviceSearch search, Candidates candidates, int groups, int group, int64_t stretch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1000
  constexpr int kWarpCodes = 16 * kTiles<kWords>;
  auto* columns = dynamic_shared<uint32_t>();
  __shared__ uint32_t begin_of[kMaxGroup<kWords>];  // of the sums of each query
  __shared__ HitQueue queues[kWarps];
  wait_for_last_kernel();
  const int64_t first_query = static_cast<int64_t>(blockIdx.x % groups) * group;
  const int queries = static_cast<int>(min(static_cast<int64_t>(group), search.queries.count - first_query));
  const int64_t begin = blockIdx.x / groups * stretch, end = min(begin + stretch, search.codes.count);
  const int warp = static_cast<int>(threadIdx.x / 32);

  write_columns<kWords>(search.queries, first_query, group, columns);
  if (threadIdx.x % 32 == 0) queues[warp].count = 0;
  int64_t size = kFirstPiece;
  for (int64_t piece = begin; piece < end; piece += size, size = min(2 * size, kLargestPiece)) {
    __syncthreads();
    for (int q = threadIdx.x; q < group; q += kBlockThreads)
      begin_of[q] = q < queries ? 32 * kWords + candidates.largest_distance(first_query + q, piece) : 0;
    __syncthreads();
    const int64_t piece_end = min(piece + size, end);
    LaneWords<kWords> words;
    BitRows<kWords>::load(search.codes, piece + warp * kWarpCodes, piece_end, words);
    for (int64_t first = piece + warp * kWarpCodes; first < piece_end; first += kWarps * kWarpCodes) {
      const Rows<kWords> rows(search, words, first, piece_end);
      // The next ones come while these are compared.
      BitRows<kWords>::load(search.codes, first + kWarps * kWarpCodes, piece_end, words);
      compare<kWords>(search, candidates, first_query, group, columns, begin_of, rows, first, piece_end, queues[warp]);
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
  const LaunchShape shape{ceil_div(search.code_count, stretch) * groups, kBlockThreads, group * kSlices<kWords> * 16, 1,
                          true};
  launch(mma_kernel<kWords>, shape, stream, DeviceSearch(search), candidates, static_cast<int>(groups),
         static_cast<int>(group), stretch);
}

}  // namespace

void launch_hamming_scan_mma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  with_bit_rows(static_cast<int>(ceil_div<int64_t>(search.code_bytes, 4)),
                [&](auto rows) { launch_mma<decltype(rows)::kCodeWords>(search, candidates, stream); });
}

}  // namespace hashengine
