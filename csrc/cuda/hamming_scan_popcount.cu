// Candidates by XOR and population count: the scan of a single query, and of every architecture without 1-bit matrices.
//
// Idea. A thread keeps some codes in registers and goes through its block's queries, whose words come from shared
// memory, one broadcast for all its codes. The nearest of its codes decides whether it looks at them one by one.
//
// Traffic. The codes are read once for each group of up to 128 queries, in pieces as wide as a code allows. With one
// query that is the floor: 8 bytes a code at 64 bits, 64 bytes under way a thread, 64 KB a multiprocessor. With many,
// population counts are the limit: 16 a clock and multiprocessor, two for 64 bits.
//
// Launch. 256 threads a block: a stretch of the codes and a group of queries. Of a stretch, a piece at a time, each
// twice as long as the last: before each, distances are brought to what limits have become. Two waves of as many blocks
// as a multiprocessor has registers for.
//
// Limits. Codes of more than 32 words are compared word by word from the caches.

#include <algorithm>

#include "hamming_topk.h"
#include "launch.cuh"

namespace hashengine {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kMaxGroup = 128;                                                            // queries
constexpr int kLongCodeBlocks = 8;                                                        // a multiprocessor
constexpr int64_t kFirstPiece = 16 * kBlockThreads, kLargestPiece = 256 * kBlockThreads;  // codes

// That a thread has at once: 64 bytes, or as many codes as there are registers for the distances of.
template <int kWords>
constexpr int kCodes = kWords <= 2   ? 8
                       : kWords <= 8 ? 16 / kWords
                                     : 1;
template <int kWords>
constexpr int kBlocks = kWords == 1    ? 4
                        : kWords <= 16 ? 3
                                       : 2;  // that a multiprocessor holds

// A code's words, as many at once as it has and memory delivers; zeros behind its end. The other way, byte by byte
// where it must be, is many times as long, and among the loads of a thread it would keep them from following each
// other.
template <int kWords, bool kIsVector>
__device__ __forceinline__ void load_code(const CodeRows& codes, int64_t position, uint32_t (&words)[kWords]) {
  constexpr int kWidth = kWords < 4 ? kWords : 4;
  if constexpr (kIsVector) {
    const auto* row = reinterpret_cast<const uint32_t*>(codes.rows) + position * kWords;
#pragma unroll
    for (int i = 0; i < kWords; i += kWidth) {
      const auto piece = vector_at<kWidth>(row, i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) words[i + j] = piece.at[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = i < codes.words() ? codes.word(position, i) : 0;
  }
}

// The queries of a block: their words, and how far their candidates may be.
template <int kWords>
struct Group {
  uint32_t (*words)[kWords];
  int* largest;
};

template <int kWords>
__device__ __forceinline__ void compare(const DeviceSearch& search, const Candidates& candidates, int64_t first_query,
                                        int queries, const Group<kWords>& group, int64_t first, int64_t end,
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
    const int largest = group.largest[q];
    if (nearest > largest) continue;
    unsigned passing = 0;
#pragma unroll
    for (int c = 0; c < kCodes<kWords>; ++c)
      passing |= static_cast<unsigned>(distances[c] <= largest && first + c * kBlockThreads < end) << c;
    for (; passing != 0; passing &= passing - 1)
      candidates.offer(search, first_query + q, first + (__ffs(static_cast<int>(passing)) - 1) * kBlockThreads);
  }
}

template <int kWords, bool kIsVector>
__global__ void __launch_bounds__(kBlockThreads, kIsVector ? kBlocks<kWords> : 2)
    popcount_kernel(DeviceSearch search, Candidates candidates, int groups, int64_t stretch) {
  __shared__ uint32_t words[kMaxGroup][kWords];
  __shared__ int largest[kMaxGroup];
  wait_for_last_kernel();
  const int64_t first_query = static_cast<int64_t>(blockIdx.x % groups) * kMaxGroup;
  const int queries = static_cast<int>(min(static_cast<int64_t>(kMaxGroup), search.queries.count - first_query));
  const int64_t begin = blockIdx.x / groups * stretch, end = min(begin + stretch, search.codes.count);
  for (int i = threadIdx.x; i < queries * kWords; i += kBlockThreads) {
    const int q = i / kWords, word = i % kWords;
    words[q][word] = word < search.queries.words() ? search.queries.word(first_query + q, word) : 0;
  }
  uint32_t codes[kCodes<kWords>][kWords];
  const auto load = [&](int64_t first, int64_t end) {
#pragma unroll
    for (int c = 0; c < kCodes<kWords>; ++c)
      load_code<kWords, kIsVector>(search.codes, min(first + c * kBlockThreads, end - 1), codes[c]);
  };
  int64_t size = kFirstPiece;
  for (int64_t piece = begin; piece < end; piece += size, size = min(2 * size, kLargestPiece)) {
    const int64_t piece_end = min(piece + size, end);
    load(piece + threadIdx.x, piece_end);  // on their way while the limits come
    __syncthreads();
    for (int q = threadIdx.x; q < queries; q += kBlockThreads)
      largest[q] = candidates.largest_distance(first_query + q, piece);
    __syncthreads();
    for (int64_t first = piece + threadIdx.x; first < piece_end;) {
      compare<kWords>(search, candidates, first_query, queries, {words, largest}, first, piece_end, codes);
      first += kCodes<kWords> * kBlockThreads;
      if (first < piece_end) load(first, piece_end);
    }
  }
}

// Codes of any length, a thread a code.
__global__ void __launch_bounds__(kBlockThreads)
    long_code_kernel(DeviceSearch search, Candidates candidates, int groups, int64_t stretch) {
  wait_for_last_kernel();
  const int64_t first_query = static_cast<int64_t>(blockIdx.x % groups) * kMaxGroup;
  const int64_t end_query = min(first_query + kMaxGroup, search.queries.count);
  const int64_t begin = blockIdx.x / groups * stretch, end = min(begin + stretch, search.codes.count);
  for (int64_t position = begin + threadIdx.x; position < end; position += kBlockThreads)
    for (int64_t query = first_query; query < end_query; ++query) candidates.offer(search, query, position);
}

// The codes of a block, where each multiprocessor gets so many blocks and each block whole rounds of so many codes.
struct Cut {
  int64_t groups, stretch;
  LaunchShape shape;

  Cut(const HammingSearch& search, int64_t blocks, int64_t round)
      : groups(ceil_div<int64_t>(search.query_count, kMaxGroup)) {
    const int64_t wanted = device_attribute(cudaDevAttrMultiProcessorCount) * blocks;
    stretch = round_up(ceil_div(search.code_count, std::max<int64_t>(wanted / groups, 1)), round);
    shape = {ceil_div(search.code_count, stretch) * groups, kBlockThreads, 0, 1, true};
  }
};

template <int kWords>
void launch_popcount(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  const bool is_vector = search.code_bytes == 4 * kWords && is_aligned(search.codes, 4 * std::min(kWords, 4));
  const Cut cut(search, 2 * kBlocks<kWords>, kCodes<kWords> * kBlockThreads);
  launch(is_vector ? popcount_kernel<kWords, true> : popcount_kernel<kWords, false>, cut.shape, stream,
         DeviceSearch(search), candidates, static_cast<int>(cut.groups), cut.stretch);
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
  const Cut cut(search, kLongCodeBlocks, kBlockThreads);
  launch(long_code_kernel, cut.shape, stream, DeviceSearch(search), candidates, static_cast<int>(cut.groups),
         cut.stretch);
}

}  // namespace hashengine
