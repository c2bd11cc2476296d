// The scan that finds candidates by XOR and population counts. It serves single queries, codes of more than
// kMaxMatrixWords words, and devices whose compute capability is neither 8.x nor 9.x.
//
// Idea. A thread keeps several codes in registers and loops over its block's queries. It reads each word of a query
// from shared memory once for all of its codes. It checks its codes one by one only if the nearest of them is within
// the query's maximum distance: the largest at which a code can still be a result (candidates.cuh).
//
// Traffic. The codes are read once per group of up to 128 queries, with the widest loads that the code length permits.
// With one query this read is the floor: 8 bytes per code of 64 bits. For codes of 64, 128, 256 or 512 bits, 64 bytes
// per thread and at least 48 KB per SM are in flight. With many queries the population counts are the bottleneck: the
// distance of two 64-bit codes needs two population counts, and an SM computes 16 per clock.
//
// Launch. 256 threads per block. Each block has a segment of the codes and a group of queries. It processes the segment
// in chunks and updates the queries' maximum distances before each chunk. Each chunk is twice as long as the one
// before, up to kMaxChunk. The grid has about twice as many blocks as run at a time.
//
// Limits. Codes of more than 32 words have a kernel of their own. It reads them word by word, has no chunks and does
// not use maximum distances.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/hamming/topk_steps.h"

namespace hashengine {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kMaxGroupQueries = 128;
constexpr int kLongCodeBlocksPerSm = 8;
constexpr int64_t kFirstChunk = 16 * kBlockThreads, kMaxChunk = 256 * kBlockThreads;  // lengths, in codes

// The codes that a thread holds at a time: 64 bytes, but at least one code and at most eight. The number is limited
// because each code needs a register for its distance.
template <int kWords>
constexpr int kCodes = kWords <= 2   ? 8
                       : kWords <= 8 ? 16 / kWords
                                     : 1;
// For __launch_bounds__: limits the registers so that an SM can run this number of blocks.
template <int kWords>
constexpr int kBlocksPerSm = kWords == 1    ? 4
                             : kWords <= 16 ? 3
                                            : 2;

// Loads a code into `words`; words after the code's end are zero. If kIsVector, the code must have exactly kWords words
// and be aligned; an instruction then loads up to four of them. kIsVector is a template parameter, because the other
// branch can load byte by byte and would keep the compiler from issuing a thread's loads together.
template <int kWords, bool kIsVector>
__device__ __forceinline__ void load_code(const CodeRows& codes, int64_t position, uint32_t (&words)[kWords]) {
  constexpr int kWidth = kWords < 4 ? kWords : 4;
  if constexpr (kIsVector) {
    const auto* row = reinterpret_cast<const uint32_t*>(codes.rows) + position * kWords;
#pragma unroll
    for (int i = 0; i < kWords; i += kWidth) {
      const auto vector = vector_at<kWidth>(row, i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) words[i + j] = vector.at[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = i < codes.words() ? codes.word(position, i) : 0;
  }
}

// Arrays in shared memory, one entry per query of the block's group.
template <int kWords>
struct QueryGroup {
  uint32_t (*words)[kWords];
  int* max_distances;
};

// Compares the thread's codes with the queries of a group, and adds candidates. The codes are at positions `first`,
// first + kBlockThreads and so on.
template <int kWords>
__device__ __forceinline__ void compare(const DeviceSearch& search, const Candidates& candidates, int64_t first_query,
                                        int queries, const QueryGroup<kWords>& group, int64_t first, int64_t end,
                                        const uint32_t (&codes)[kCodes<kWords>][kWords]) {
  for (int q = 0; q < queries; ++q) {
    int distances[kCodes<kWords>] = {};
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t word = group.words[q][i];
#pragma unroll
      for (int c = 0; c < kCodes<kWords>; ++c) distances[c] += __popc(codes[c][i] ^ word);
    }
    int nearest = distances[0];
#pragma unroll
    for (int c = 1; c < kCodes<kWords>; ++c) nearest = min(nearest, distances[c]);
    const int max_distance = group.max_distances[q];
    if (nearest > max_distance) continue;
    unsigned hits = 0;  // one bit per code
#pragma unroll
    for (int c = 0; c < kCodes<kWords>; ++c)
      hits |= static_cast<unsigned>(distances[c] <= max_distance && first + c * kBlockThreads < end) << c;
    for (; hits != 0; hits &= hits - 1) {
      const int64_t position = first + (__ffs(static_cast<int>(hits)) - 1) * kBlockThreads;
      if (search.passes_filter(first_query + q, position))
        candidates.add_if_within_bound(search, first_query + q, position);
    }
  }
}

template <int kWords, bool kIsVector>
__global__ void __launch_bounds__(kBlockThreads, kIsVector ? kBlocksPerSm<kWords> : 2)
    popcount_kernel(DeviceSearch search, Candidates candidates, int groups, int64_t segment_codes) {
  __shared__ uint32_t words[kMaxGroupQueries][kWords];
  __shared__ int max_distances[kMaxGroupQueries];
  wait_for_previous_kernel();
  const int64_t first_query = static_cast<int64_t>(blockIdx.x % groups) * kMaxGroupQueries;
  const int queries = static_cast<int>(min(static_cast<int64_t>(kMaxGroupQueries), search.queries.count - first_query));
  const int64_t begin = blockIdx.x / groups * segment_codes, end = min(begin + segment_codes, search.codes.count);
  for (int i = threadIdx.x; i < queries * kWords; i += kBlockThreads) {
    const int q = i / kWords, word = i % kWords;
    words[q][word] = word < search.queries.words() ? search.queries.word(first_query + q, word) : 0;
  }
  uint32_t codes[kCodes<kWords>][kWords];
  const auto load = [&](int64_t first, int64_t chunk_end) {
#pragma unroll
    for (int c = 0; c < kCodes<kWords>; ++c)
      load_code<kWords, kIsVector>(search.codes, min(first + c * kBlockThreads, chunk_end - 1), codes[c]);
  };
  int64_t chunk_codes = kFirstChunk;
  for (int64_t chunk = begin; chunk < end; chunk += chunk_codes, chunk_codes = min(2 * chunk_codes, kMaxChunk)) {
    const int64_t chunk_end = min(chunk + chunk_codes, end);
    load(chunk + threadIdx.x, chunk_end);  // the loads are in flight while the maximum distances are updated
    __syncthreads();
    for (int q = threadIdx.x; q < queries; q += kBlockThreads)
      max_distances[q] = candidates.max_distance(first_query + q, chunk);
    __syncthreads();
    for (int64_t first = chunk + threadIdx.x; first < chunk_end;) {
      compare<kWords>(search, candidates, first_query, queries, {words, max_distances}, first, chunk_end, codes);
      first += kCodes<kWords> * kBlockThreads;
      if (first < chunk_end) load(first, chunk_end);
    }
  }
}

// The kernel for codes of more than 32 words. A thread compares one code at a time.
__global__ void __launch_bounds__(kBlockThreads)
    long_code_kernel(DeviceSearch search, Candidates candidates, int groups, int64_t segment_codes) {
  wait_for_previous_kernel();
  const int64_t first_query = static_cast<int64_t>(blockIdx.x % groups) * kMaxGroupQueries;
  const int64_t end_query = min(first_query + kMaxGroupQueries, search.queries.count);
  const int64_t begin = blockIdx.x / groups * segment_codes, end = min(begin + segment_codes, search.codes.count);
  for (int64_t position = begin + threadIdx.x; position < end; position += kBlockThreads)
    for (int64_t query = first_query; query < end_query; ++query)
      candidates.add_if_within_bound(search, query, position);
}

// A grid of about `blocks_per_sm` blocks per SM. The length of a segment is a multiple of `round_codes`, the number of
// codes that a block compares at a time.
struct ScanGrid {
  int64_t groups, segment_codes;
  LaunchShape shape;

  ScanGrid(const HammingSearch& search, int64_t blocks_per_sm, int64_t round_codes)
      : groups(ceil_div<int64_t>(search.query_count, kMaxGroupQueries)) {
    const int64_t max_blocks = device_attribute(cudaDevAttrMultiProcessorCount) * blocks_per_sm;
    segment_codes = round_up(ceil_div(search.code_count, std::max<int64_t>(max_blocks / groups, 1)), round_codes);
    shape = {ceil_div(search.code_count, segment_codes) * groups, kBlockThreads, 0, 1, true};
  }
};

template <int kWords>
void launch_popcount(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  const bool is_vector = search.code_bytes == 4 * kWords && is_aligned(search.codes, 4 * std::min(kWords, 4));
  constexpr int kWaves = 2;  // the number of times that the grid fills the device
  const auto kernel = is_vector ? popcount_kernel<kWords, true> : popcount_kernel<kWords, false>;
  const ScanGrid grid(search, kWaves * resident_blocks(kernel, {0, kBlockThreads}), kCodes<kWords> * kBlockThreads);
  launch(kernel, grid.shape, stream, DeviceSearch(search), candidates, static_cast<int>(grid.groups),
         grid.segment_codes);
}

}  // namespace

void launch_hamming_scan_popcount(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  const int64_t words = ceil_div<int64_t>(search.code_bytes, 4);
  if (words == 1) return launch_popcount<1>(search, candidates, stream);
  if (words == 2) return launch_popcount<2>(search, candidates, stream);
  if (words <= 4) return launch_popcount<4>(search, candidates, stream);
  if (words <= 8) return launch_popcount<8>(search, candidates, stream);
  if (words <= 16) return launch_popcount<16>(search, candidates, stream);
  if (words <= 32) return launch_popcount<32>(search, candidates, stream);
  const ScanGrid grid(search, kLongCodeBlocksPerSm, kBlockThreads);
  launch(long_code_kernel, grid.shape, stream, DeviceSearch(search), candidates, static_cast<int>(grid.groups),
         grid.segment_codes);
}

}  // namespace hashengine
