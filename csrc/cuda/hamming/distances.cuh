// Distances between codes and up to eight queries at a time, for hamming_count.cu and hamming_range.cu.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/hamming/device_search.cuh"

namespace hashengine {

using Count = unsigned long long;  // the 64-bit type that atomicAdd accepts

constexpr int kCountThreads = 256;
constexpr int kCountBlocksPerSm = 3;  // for __launch_bounds__: limits the registers so that an SM can run three blocks
// Shared memory for a block's counters. Without labels it suffices for eight queries of 1,024 bits, which need 1,025
// counters each. It is not much larger than that, so that an SM can run several blocks.
constexpr int64_t kMaxCounterBytes = 36 << 10;

// Codes that a thread compares at a time: enough to keep several loads in flight, and so few that their distances fit
// in registers.
template <int kQueries>
constexpr int kCodesPerStep = kQueries == 8 ? 2 : 4;

// Sets distances[c][q] to the distance between query q and the code at position + c * stride. query_words(i) must
// return word i of all queries as a Vector<uint32_t, kQueries>. Positions from `end` on are replaced by end - 1; the
// caller must ignore their distances.
template <int kQueries, int kCodes, typename QueryWords>
__device__ __forceinline__ void compute_distances(const CodeRows& codes, int64_t position, int stride, int64_t end,
                                                  QueryWords query_words, int (&distances)[kCodes][kQueries]) {
  int64_t rows[kCodes];
#pragma unroll
  for (int c = 0; c < kCodes; ++c) {
    rows[c] = min(position + c * stride, end - 1);
#pragma unroll
    for (int q = 0; q < kQueries; ++q) distances[c][q] = 0;
  }
  for (int i = 0; i < codes.words(); ++i) {
    const Vector<uint32_t, kQueries> words = query_words(i);
    uint32_t code_words[kCodes];
    if (codes.has_whole_words) {
#pragma unroll
      for (int c = 0; c < kCodes; ++c) code_words[c] = codes.whole_word(rows[c], i);
    } else {
#pragma unroll
      for (int c = 0; c < kCodes; ++c) code_words[c] = codes.word(rows[c], i);
    }
#pragma unroll
    for (int c = 0; c < kCodes; ++c)
#pragma unroll
      for (int q = 0; q < kQueries; ++q) distances[c][q] += __popc(code_words[c] ^ words.at[q]);
  }
}

// The queries of a block: kQueries queries, starting with first_query. Their words are in shared memory, where one or
// two loads read word i of all of them. If fewer queries are left, copies of the last query fill the other places.
template <int kQueries>
struct StagedQueries {
  const DeviceSearch& search;
  int64_t first_query;
  uint32_t* words;  // [word][query]

  // The size of `words` in bytes, a multiple of 16.
  static HE_HOST_DEVICE int64_t bytes(int64_t code_bytes) {
    return ceil_div<int64_t>(ceil_div<int64_t>(code_bytes, 4) * kQueries, 4) * 16;
  }

  // Stores the words in shared memory. Every thread must call. A __syncthreads() must separate this call from
  // for_each_distance().
  __device__ __forceinline__ StagedQueries(const DeviceSearch& device_search, int64_t first, uint32_t* shared_words)
      : search(device_search), first_query(first), words(shared_words) {
    for (int i = threadIdx.x; i < search.queries.words() * kQueries; i += kCountThreads)
      words[i] = search.queries.word(min(first_query + i % kQueries, search.queries.count - 1), i / kQueries);
  }

  // Calls visit(q, position, distance) for each query first_query + q of the block and each position in [begin, end)
  // whose code passes the filter of this query. The codes are distributed over the block's threads.
  template <typename Visit>
  __device__ __forceinline__ void for_each_distance(int64_t begin, int64_t end, Visit visit) const {
    constexpr int kCodes = kCodesPerStep<kQueries>;
    const auto query_words = [this](int i) { return vector_at<kQueries>(words, int64_t{i} * kQueries); };
    for (int64_t position = begin + threadIdx.x; position < end; position += kCodes * kCountThreads) {
      int distances[kCodes][kQueries];
      compute_distances(search.codes, position, kCountThreads, end, query_words, distances);
#pragma unroll
      for (int c = 0; c < kCodes; ++c) {
        const int64_t at = position + c * kCountThreads;
        if (at >= end) break;
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          const int64_t query = first_query + q;
          if (query < search.queries.count && search.passes_filter(query, at)) visit(q, at, distances[c][q]);
        }
      }
    }
  }
};

// A number as a type, so that a function can use it as a template argument.
template <int kValue>
struct QueriesPerBlock {
  static constexpr int value = kValue;
};

// Calls function(QueriesPerBlock<n>()). The counters of a query take `counter_bytes`. n is the largest of 8, 4 and 2
// for which there are at least n queries and their counters fit in kMaxCounterBytes; otherwise n is 1.
template <typename Function>
void with_queries_per_block(int64_t queries, int64_t counter_bytes, Function function) {
  const auto fits = [&](int64_t count) { return count <= queries && count * counter_bytes <= kMaxCounterBytes; };
  if (fits(8)) return function(QueriesPerBlock<8>());
  if (fits(4)) return function(QueriesPerBlock<4>());
  if (fits(2)) return function(QueriesPerBlock<2>());
  function(QueriesPerBlock<1>());
}

}  // namespace hashengine
