// The scan that finds candidates with the matrix instruction `mma`. A warp holds 16 to 64 codes in registers and
// compares them with all queries of its block.
//
// Idea. d is a code and q a query, both padded with zeros to b bits. A row is [d, ~d] and a column is [q, ~q]. Their
// product is the number of bits that agree, b - distance. Each sum starts with b + T, where T is the query's maximum
// distance. Therefore the bit of value 2b is set exactly if distance <= T. If T changes, only this initial sum changes.
// For codes of more than 64 bits only q is stored, and the lanes compute ~q.
//
// A warp computes the sums of up to 32 columns (16 for codes of 256 bits) and ORs all of them, before it checks the OR
// and branches. Only if the bit is set in any lane, it computes the sums again, eight columns at a time, and queues the
// hits.
//
// If all queries share a filter, the rows of excluded codes are zero, and a warp whose codes are all excluded compares
// nothing.
//
// Traffic, for codes of 64 bits. The codes are read once per group of up to 1,024 queries (16 KB of columns), 8 bytes
// per code. Estimated: with 2 to about 32 queries, this read is the bottleneck, and with more queries the instructions.
//
// Instructions (nvcc 13.0, sm_90a), of a warp for 64 codes of 64 bits without a hit: 79 for up to 8 queries, 95 for up
// to 16, 127 for up to 32, and 54 plus 80 per 32 queries for more. 16 of the 80 use the matrix unit, and 32 compute the
// OR.
//
// Launch. 256 threads per block, and as many blocks as the multiprocessors run at a time. Each block has a segment of
// the codes and a group of queries. It processes the segment in chunks and updates the initial sums before each chunk.
// Each chunk is twice as long as the one before, up to kMaxChunk.
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

template <int kWords>
constexpr uint32_t kCandidateBit = 64 * kWords;  // 2b

// The number of tiles (16 codes each) that a warp holds in registers at a time, so that several loads are in flight.
template <int kWords>
constexpr int kTiles = kWords <= 4    ? 4
                       : kWords <= 16 ? 2
                                      : 1;

// A lane's words of its warp's codes, as BitRows::load() loads them.
template <int kWords>
using LaneWords = uint32_t[kTiles<kWords>][2][BitRows<kWords>::kLaneWords];

// The filter that all queries share, read for a warp's codes at a time: each lane holds one byte, which has the bits of
// eight codes.
template <int kWords>
struct SharedFilter {
  static constexpr int kBytes = 2 * kTiles<kWords>;

  const uint8_t* bytes;  // null if there is no such filter
  int64_t last;          // the index of the filter's last byte

  __device__ __forceinline__ explicit SharedFilter(const DeviceSearch& search)
      : bytes(search.filter_stride == 0 ? search.filter : nullptr), last((search.codes.count - 1) / 8) {}

  // The lane's byte for the warp's codes that begin at position `first`, a multiple of 8.
  __device__ __forceinline__ uint32_t load(int64_t first) const {
    return bytes != nullptr ? __ldg(bytes + min(first / 8 + threadIdx.x % kBytes, last)) : 0xff;
  }

  // Whether the filter lets the queries find the code of one of the lane's rows. `row` is 2 * tile for row g of a tile,
  // and 2 * tile + 1 for row g + 8. `byte` comes from load(). The whole warp must call.
  static __device__ __forceinline__ bool passes(uint32_t byte, int row) {
    return (__shfl_sync(kWholeWarp, byte, row) >> threadIdx.x % 32 / 4 & 1) != 0;
  }
};

// A lane's words of the rows [d, ~d] of its warp's codes.
template <int kWords>
struct Rows {
  uint32_t tiles[kTiles<kWords>][kSlices<kWords>][kSliceLaneWords<kWords>];

  // Rows of codes that the filter excludes are zero. A column has no hit with such a row, except if the query's maximum
  // distance admits every code. `filter_byte` comes from filter.load().
  __device__ __forceinline__ Rows(const LaneWords<kWords>& words, const SharedFilter<kWords>& filter,
                                  uint32_t filter_byte) {
    // For codes of two words, lanes 4g + 2 and 4g + 3 hold the complements.
    const uint32_t flip = kWords == 2 && threadIdx.x % 4 >= 2 ? ~0u : 0;
#pragma unroll
    for (int tile = 0; tile < kTiles<kWords>; ++tile)
#pragma unroll
      for (int slice = 0; slice < kSlices<kWords>; ++slice)
#pragma unroll
        for (int i = 0; i < kSliceLaneWords<kWords>; ++i)
          tiles[tile][slice][i] = i < 2 ? words[tile][i][slice] ^ flip : ~words[tile][i - 2][slice];
    if (filter.bytes != nullptr) {
#pragma unroll
      for (int row = 0; row < 2 * kTiles<kWords>; ++row) {
        const uint32_t mask = filter.passes(filter_byte, row) ? ~0u : 0;
#pragma unroll
        for (int slice = 0; slice < kSlices<kWords>; ++slice)
#pragma unroll
          for (int i = row % 2; i < kSliceLaneWords<kWords>; i += 2) tiles[row / 2][slice][i] &= mask;
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles<kWords>; ++tile)
#pragma unroll
      for (int slice = 0; slice < kSlices<kWords>; ++slice) pin_registers(tiles[tile][slice]);
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

// The initial sums of a lane for a group of eight columns. One instruction loads them.
using InitialSums = Vector<uint32_t, 4>;

template <int kTileCount>
__device__ __forceinline__ uint32_t or_sums(uint32_t any, const uint32_t (&sums)[kTileCount][4]) {
#pragma unroll
  for (int tile = 0; tile < kTileCount; ++tile)
    any = or3(or3(any, sums[tile][0], sums[tile][1]), sums[tile][2], sums[tile][3]);
  return any;
}

// The columns of kGroups groups of eight queries. The words are in registers. The initial sums are read from shared
// memory for each use, because they would take four times as many registers as words of two-word codes.
template <int kWords, int kGroups>
struct Columns {
  uint32_t words[kGroups][kSlices<kWords>];
  const InitialSums*
      initial_sums;  // the lane's initial sums of the first group; those of the next group follow 4 later

  // Loads the words from shared memory. The first group is number `first_group`.
  __device__ __forceinline__ Columns(const uint32_t* columns, const InitialSums* all_initial_sums, int first_group)
      : initial_sums(all_initial_sums + 4 * first_group + threadIdx.x % 4) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int slice = 0; slice < kSlices<kWords>; ++slice)
        words[group][slice] = columns[((first_group + group) * kSlices<kWords> + slice) * 32 + threadIdx.x % 32];
  }

  // Keeps the words in registers.
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) pin_registers(words[group]);
  }

  // Computes the sums of a group. The whole warp must call.
  __device__ __forceinline__ void sum(const Rows<kWords>& rows, int group, uint32_t (&sums)[kTiles<kWords>][4]) const {
    const InitialSums initial = initial_sums[4 * group];
#pragma unroll
    for (int slice = 0; slice < kSlices<kWords>; ++slice) {
      uint32_t column[kSliceLaneWords<kWords> / 2];
#pragma unroll
      for (int i = 0; i < kSliceLaneWords<kWords> / 2; ++i)
        column[i] = i == 0 ? words[group][slice] : ~words[group][slice];
#pragma unroll
      for (int tile = 0; tile < kTiles<kWords>; ++tile) {
        if (slice == 0)
          mma_and_popcount(sums[tile], rows.tiles[tile][slice], column, initial.at);
        else
          mma_and_popcount(sums[tile], rows.tiles[tile][slice], column, sums[tile]);
      }
    }
  }

  // The OR of the sums of all groups. The whole warp must call.
  __device__ __forceinline__ uint32_t or_all_sums(const Rows<kWords>& rows) const {
    uint32_t any = 0;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint32_t sums[kTiles<kWords>][4];
      sum(rows, group, sums);
      any = or_sums(any, sums);
    }
    return any;
  }
};

// Queues the hits of the warp's codes, which begin at position `first`, with a group of eight columns. The first column
// is that of query `first_query`. The whole warp must call.
template <int kWords>
__device__ __forceinline__ void queue_hits(const DeviceSearch& search, const Candidates& candidates,
                                           int64_t first_query, const Columns<kWords, 1>& columns,
                                           const Rows<kWords>& rows, int64_t first, int64_t end, HitQueue& queue) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint32_t sums[kTiles<kWords>][4];
  columns.sum(rows, 0, sums);
  if (or_sums(0, sums) & kCandidateBit<kWords>) {
    unsigned hits = 0;  // bit i is set if sum i is a hit
#pragma unroll
    for (int i = 0; i < 4 * kTiles<kWords>; ++i)
      hits |= static_cast<unsigned>((sums[i / 4][i % 4] & kCandidateBit<kWords>) != 0) << i;
    for (; hits != 0; hits &= hits - 1) {
      const int i = __ffs(static_cast<int>(hits)) - 1;
      const int64_t query = first_query + column_of_sum(lane, i % 4);
      const int64_t position = first + i / 4 * 16 + row_of_sum(lane, i % 4);
      if (position < end && search.passes_filter(query, position)) queue.push(search, candidates, query, position);
    }
  }
  __syncwarp();
}

// kGroups is the number of groups of eight queries that a warp compares before it checks the OR. If kIsSingleStep, the
// block has no other groups, and the columns stay in registers during a chunk.
template <int kWords, int kGroups, bool kIsSingleStep>
__global__ void __launch_bounds__(kBlockThreads, kWords == 2    ? 4
                                                 : kWords <= 8  ? 3
                                                 : kWords <= 16 ? 2
                                                                : 1)
    mma_kernel(DeviceSearch search, Candidates candidates, int blocks_per_segment, int group_queries,
               int64_t segment_codes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1000
  constexpr int kWarpCodes = 16 * kTiles<kWords>;
  auto* columns = dynamic_shared<uint32_t>();
  __shared__ InitialSums initial_sums[kIsSingleStep ? 4 * kGroups : kMaxGroupQueries<kWords> / 2];
  __shared__ HitQueue queues[kWarps];
  wait_for_previous_kernel();
  const int64_t first_query = static_cast<int64_t>(blockIdx.x % blocks_per_segment) * group_queries;
  const int queries = static_cast<int>(min(static_cast<int64_t>(group_queries), search.queries.count - first_query));
  const int64_t begin = blockIdx.x / blocks_per_segment * segment_codes,
                end = min(begin + segment_codes, search.codes.count);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const SharedFilter<kWords> filter(search);

  store_columns<kWords>(search.queries, first_query, group_queries, columns);
  if (threadIdx.x % 32 == 0) queues[warp].count = 0;
  int64_t chunk_codes = kFirstChunk;
  for (int64_t chunk = begin; chunk < end; chunk += chunk_codes, chunk_codes = min(2 * chunk_codes, kMaxChunk)) {
    __syncthreads();
    for (int q = threadIdx.x; q < group_queries; q += kBlockThreads) {
      const uint32_t sum = q < queries ? 32 * kWords + candidates.max_distance(first_query + q, chunk) : 0;
      initial_sums[q / 2].at[q % 2] = initial_sums[q / 2].at[2 + q % 2] = sum;
    }
    __syncthreads();
    const int64_t chunk_end = min(chunk + chunk_codes, end);
    Columns<kWords, kGroups> kept(columns, initial_sums, 0);  // not used unless kIsSingleStep
    if constexpr (kIsSingleStep) kept.pin();
    LaneWords<kWords> words;
    BitRows<kWords>::load(search.codes, chunk + warp * kWarpCodes, chunk_end, words);
    uint32_t filter_byte = filter.load(chunk + warp * kWarpCodes);
    for (int64_t first = chunk + warp * kWarpCodes; first < chunk_end; first += kWarps * kWarpCodes) {
      const Rows<kWords> rows(words, filter, filter_byte);
      const bool can_find_any = filter.bytes == nullptr || __any_sync(kWholeWarp, filter_byte != 0);
      // Load the next codes while these are compared.
      BitRows<kWords>::load(search.codes, first + kWarps * kWarpCodes, chunk_end, words);
      filter_byte = filter.load(first + kWarps * kWarpCodes);
      if (!can_find_any) continue;
      for (int group = 0; kIsSingleStep ? group == 0 : 8 * group < group_queries; group += kGroups) {
        uint32_t any = 0;
        if constexpr (kIsSingleStep) {
          any = kept.or_all_sums(rows);
        } else {
          any = Columns<kWords, kGroups>(columns, initial_sums, group).or_all_sums(rows);
        }
        if (!__any_sync(kWholeWarp, (any & kCandidateBit<kWords>) != 0)) continue;
#pragma unroll 1
        for (int i = group; i < group + kGroups; ++i)
          queue_hits<kWords>(search, candidates, first_query + 8 * i, Columns<kWords, 1>(columns, initial_sums, i),
                             rows, first, chunk_end, queues[warp]);
        queues[warp].drain(search, candidates, kWarpThreads);
      }
    }
  }
  queues[warp].drain(search, candidates, 1);
#endif
}

template <int kWords, int kGroups, bool kIsSingleStep>
void launch_mma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  const auto kernel = mma_kernel<kWords, kGroups, kIsSingleStep>;
  const int64_t blocks_per_segment =
      kIsSingleStep ? 1 : ceil_div<int64_t>(search.query_count, kMaxGroupQueries<kWords>);
  const int64_t group_queries = round_up(ceil_div(search.query_count, blocks_per_segment), int64_t{8 * kGroups});
  LaunchShape shape{0, kBlockThreads, group_queries * kSlices<kWords> * 16, 1, true};
  const int64_t max_blocks = device_attribute(cudaDevAttrMultiProcessorCount) * resident_blocks(kernel, shape);
  const int64_t segments = std::max<int64_t>(max_blocks / blocks_per_segment, 1);
  const int64_t segment_codes = round_up(ceil_div(search.code_count, segments), 64 * kWarps);
  shape.blocks = ceil_div(search.code_count, segment_codes) * blocks_per_segment;
  launch(kernel, shape, stream, DeviceSearch(search), candidates, static_cast<int>(blocks_per_segment),
         static_cast<int>(group_queries), segment_codes);
}

template <int kWords>
void launch_mma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  constexpr bool kKeepsColumns = kWords == 2;  // for longer codes, the columns do not fit in registers
  // Four groups of codes of eight words would need more registers than three blocks per multiprocessor have.
  constexpr int kMaxGroups = kWords == 8 ? 2 : 4;
  if (search.query_count <= 8) return launch_mma<kWords, 1, kKeepsColumns>(search, candidates, stream);
  if (search.query_count <= 16) return launch_mma<kWords, 2, kKeepsColumns>(search, candidates, stream);
  if (search.query_count <= 32) return launch_mma<kWords, kMaxGroups, kKeepsColumns>(search, candidates, stream);
  launch_mma<kWords, kMaxGroups, false>(search, candidates, stream);
}

}  // namespace

void launch_hamming_scan_mma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  with_bit_rows(static_cast<int>(ceil_div<int64_t>(search.code_bytes, 4)),
                [&](auto rows) { launch_mma<decltype(rows)::kCodeWords>(search, candidates, stream); });
}

}  // namespace hashengine
