// The scan that finds candidates with the matrix instruction `mma`. A warp holds 16 to 64 codes in registers and
// compares them with all queries of its block.
//
// Idea. d is a code and q a query, both padded with zeros to b bits. A row is [d, ~d] and a column is [q, ~q]. Their
// product is the number of bits that agree, b - distance. Each sum starts with b + T, where T is the query's maximum
// distance. Therefore the bit of value 2b is set exactly if distance <= T. If T changes, only this initial sum changes.
// For codes of more than 64 bits only q is stored, and the lanes compute ~q. For eight columns at a time, a lane ORs
// its sums, and checks them one by one only if the OR has the bit.
//
// Traffic, for codes of 64 bits. The codes are read once per group of up to 1,024 queries (16 KB of columns), 8 bytes
// per code. Estimated: with 2 to about 32 queries, this read is the bottleneck. With more queries, it is the
// instructions: a warp needs about 40 per 64 codes and eight queries; four of them use the matrix unit.
//
// Launch. 256 threads per block. Each block has a segment of the codes and a group of queries. It processes the segment
// in chunks and updates the initial sums before each chunk. Each chunk is twice as long as the one before, up to
// kMaxChunk.
//
// Limits. Codes of at most kMaxMatrixWords words. Compute capability 8.0 to 9.0; in code for later devices the kernel
// is empty.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/hamming/bit_rows.cuh"
#include "cuda/hamming/hit_queue.cuh"
#include "cuda/hamming/topk_steps.h"

namespace hashengine {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kWarps = kBlockThreads / 32;
constexpr int kColumnBytes = 16 << 10;  // shared memory for the columns of a group
constexpr int kBlocksPerSm = 4;
// The lengths of the first and of the longest chunk, in codes. They are multiples of the number of codes that a block's
// warps compare at a time.
[[maybe_unused]] constexpr int64_t kFirstChunk = 4 * 64 * kWarps, kMaxChunk = 64 * 64 * kWarps;

// A slice is the part of a row that one instruction processes: four words of a code and their complements. For codes of
// two words, it is the two words and their complements.
template <int kWords>
constexpr int kSlices = kWords == 2 ? 1 : kWords / 4;
template <int kWords>
constexpr int kSliceLaneWords = kWords == 2 ? 2 : 4;  // words per lane, in one slice of 16 rows
// A stored column has 16 bytes per slice.
template <int kWords>
constexpr int kMaxGroupQueries = kColumnBytes / (16 * kSlices<kWords>);

// The number of tiles (16 codes each) that a warp holds in registers at a time, so that several loads are in flight.
template <int kWords>
constexpr int kTiles = kWords <= 4    ? 4
                       : kWords <= 16 ? 2
                                      : 1;

// A lane's words of its warp's codes, as BitRows::load() loads them.
template <int kWords>
using LaneWords = uint32_t[kTiles<kWords>][2][BitRows<kWords>::kLaneWords];

// A lane's words of the rows [d, ~d] of its warp's codes.
template <int kWords>
struct Rows {
  uint32_t tiles[kTiles<kWords>][kSlices<kWords>][kSliceLaneWords<kWords>];

  __device__ __forceinline__ Rows(const DeviceSearch& search, const LaneWords<kWords>& words, int64_t first,
                                  int64_t end) {
    // For codes of two words, lanes 4g + 2 and 4g + 3 hold the complements.
    const uint32_t flip = kWords == 2 && threadIdx.x % 4 >= 2 ? ~0u : 0;
#pragma unroll
    for (int tile = 0; tile < kTiles<kWords>; ++tile) {
#pragma unroll
      for (int slice = 0; slice < kSlices<kWords>; ++slice) {
#pragma unroll
        for (int i = 0; i < kSliceLaneWords<kWords>; ++i)
          tiles[tile][slice][i] = i < 2 ? words[tile][i][slice] ^ flip : ~words[tile][i - 2][slice];
      }
      BitRows<kWords>::clear_filtered_rows(search, first + 16 * tile, end, tiles[tile]);
#pragma unroll
      for (int slice = 0; slice < kSlices<kWords>; ++slice) pin_registers(tiles[tile][slice]);
    }
  }
};

// Stores the columns in shared memory, in groups of eight and slice by slice within a group. Later, lane 4g + t reads
// word t of a slice of column g.
template <int kWords>
__device__ __forceinline__ void store_columns(const CodeRows& queries, int64_t first_query, int group_queries,
                                              uint32_t* columns) {
  for (int i = threadIdx.x; i < group_queries * kSlices<kWords> * 4; i += kBlockThreads) {
    const int t = i % 4, q = i / 4 % 8 + i / (32 * kSlices<kWords>)*8, slice = i / 32 % kSlices<kWords>;
    const int word = kWords == 2 ? t % 2 : 4 * slice + t;
    const int64_t query = min(first_query + q, queries.count - 1);
    const uint32_t code = word < queries.words() ? queries.word(query, word) : 0;
    columns[i] = kWords == 2 && t >= 2 ? ~code : code;
  }
}

// The initial sums of two adjacent columns, which one instruction loads.
using SumPair = Vector<uint32_t, 2>;

// Compares the warp's codes, which start at position `first`, with all columns. Queues the hits.
template <int kWords>
__device__ __forceinline__ void compare(const DeviceSearch& search, const Candidates& candidates, int64_t first_query,
                                        int group_queries, const uint32_t* columns, const SumPair* initial_sums,
                                        const Rows<kWords>& rows, int64_t first, int64_t end, HitQueue& queue) {
  constexpr uint32_t kCandidateBit = 64 * kWords;  // 2b
  const int lane = static_cast<int>(threadIdx.x % 32);
  bool has_hits = false;
  for (int q = 0; q < group_queries; q += 8) {
    const SumPair pair = initial_sums[q / 2 + lane % 4];
    uint32_t initial[4] = {pair.at[0], pair.at[1], pair.at[0], pair.at[1]}, sums[kTiles<kWords>][4];
#pragma unroll
    for (int slice = 0; slice < kSlices<kWords>; ++slice) {
      const uint32_t word = columns[(q / 8 * kSlices<kWords> + slice) * 32 + lane];
      uint32_t column[kSliceLaneWords<kWords> / 2];
#pragma unroll
      for (int i = 0; i < kSliceLaneWords<kWords> / 2; ++i) column[i] = i == 0 ? word : ~word;
#pragma unroll
      for (int tile = 0; tile < kTiles<kWords>; ++tile)
        mma_and_popcount(sums[tile], rows.tiles[tile][slice], column, slice == 0 ? initial : sums[tile]);
    }
    uint32_t any = 0;
#pragma unroll
    for (int tile = 0; tile < kTiles<kWords>; ++tile)
      any = or3(or3(any, sums[tile][0], sums[tile][1]), sums[tile][2], sums[tile][3]);
    if (any & kCandidateBit) {
      unsigned hits = 0;  // bit i is set if sum i is a hit
#pragma unroll
      for (int i = 0; i < 4 * kTiles<kWords>; ++i)
        hits |= static_cast<unsigned>((sums[i / 4][i % 4] & kCandidateBit) != 0) << i;
      for (; hits != 0; hits &= hits - 1) {
        const int i = __ffs(static_cast<int>(hits)) - 1;
        const int64_t query = first_query + q + column_of_sum(lane, i % 4);
        const int64_t position = first + i / 4 * 16 + row_of_sum(lane, i % 4);
        if (position < end && search.passes_filter(query, position)) queue.push(search, candidates, query, position);
      }
      has_hits = true;
    }
    __syncwarp();
  }
  if (__any_sync(kWholeWarp, has_hits)) queue.drain(search, candidates, kWarpThreads);
}

template <int kWords>
__global__ void __launch_bounds__(kBlockThreads, kWords <= 8    ? 3
                                                 : kWords <= 16 ? 2
                                                                : 1)
    mma_kernel(DeviceSearch search, Candidates candidates, int groups, int group_queries, int64_t segment_codes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1000
  constexpr int kWarpCodes = 16 * kTiles<kWords>;
  auto* columns = dynamic_shared<uint32_t>();
  __shared__ SumPair initial_sums[kMaxGroupQueries<kWords> / 2];
  __shared__ HitQueue queues[kWarps];
  wait_for_previous_kernel();
  const int64_t first_query = static_cast<int64_t>(blockIdx.x % groups) * group_queries;
  const int queries = static_cast<int>(min(static_cast<int64_t>(group_queries), search.queries.count - first_query));
  const int64_t begin = blockIdx.x / groups * segment_codes, end = min(begin + segment_codes, search.codes.count);
  const int warp = static_cast<int>(threadIdx.x / 32);

  store_columns<kWords>(search.queries, first_query, group_queries, columns);
  if (threadIdx.x % 32 == 0) queues[warp].count = 0;
  int64_t chunk_codes = kFirstChunk;
  for (int64_t chunk = begin; chunk < end; chunk += chunk_codes, chunk_codes = min(2 * chunk_codes, kMaxChunk)) {
    __syncthreads();
    for (int q = threadIdx.x; q < group_queries; q += kBlockThreads)
      initial_sums[q / 2].at[q % 2] = q < queries ? 32 * kWords + candidates.max_distance(first_query + q, chunk) : 0;
    __syncthreads();
    const int64_t chunk_end = min(chunk + chunk_codes, end);
    LaneWords<kWords> words;
    BitRows<kWords>::load(search.codes, chunk + warp * kWarpCodes, chunk_end, words);
    for (int64_t first = chunk + warp * kWarpCodes; first < chunk_end; first += kWarps * kWarpCodes) {
      const Rows<kWords> rows(search, words, first, chunk_end);
      // Load the next codes while these are compared.
      BitRows<kWords>::load(search.codes, first + kWarps * kWarpCodes, chunk_end, words);
      compare<kWords>(search, candidates, first_query, group_queries, columns, initial_sums, rows, first, chunk_end,
                      queues[warp]);
    }
  }
  queues[warp].drain(search, candidates, 1);
#endif
}

template <int kWords>
void launch_mma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  const int64_t groups = ceil_div<int64_t>(search.query_count, kMaxGroupQueries<kWords>);
  const int64_t group_queries = round_up(ceil_div(search.query_count, groups), 8);
  const int64_t max_blocks = device_attribute(cudaDevAttrMultiProcessorCount) * kBlocksPerSm;
  const int64_t segments = std::max<int64_t>(max_blocks / groups, 1);
  const int64_t segment_codes = round_up(ceil_div(search.code_count, segments), 64 * kWarps);
  const LaunchShape shape{ceil_div(search.code_count, segment_codes) * groups, kBlockThreads,
                          group_queries * kSlices<kWords> * 16, 1, true};
  launch(mma_kernel<kWords>, shape, stream, DeviceSearch(search), candidates, static_cast<int>(groups),
         static_cast<int>(group_queries), segment_codes);
}

}  // namespace

void launch_hamming_scan_mma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  with_bit_rows(static_cast<int>(ceil_div<int64_t>(search.code_bytes, 4)),
                [&](auto rows) { launch_mma<decltype(rows)::kCodeWords>(search, candidates, stream); });
}

}  // namespace hashengine
