// Distances between codes and a few queries at a time, for the kernels that count codes by distance.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/hamming/device_search.cuh"

namespace hashengine {

using Count = unsigned long long;  // 64 bits, in the type that atomicAdd accepts

constexpr int kCountThreads = 256;
constexpr int kCountBlocksPerSm = 3;  // as many as the registers permit
// Shared memory for a block's counters. It suffices for eight queries of 1,024 bits with 1,025 counters each. It is not
// much larger, so that an SM can hold several blocks.
constexpr int64_t kMaxCounterBytes = 36 << 10;

// Codes per thread at a time: enough to keep several loads in flight, but so few that their distances fit in registers.
template <int kQueries>
constexpr int kCodesPerStep = kQueries == 8 ? 2 : 4;

// distances[c][q] is the distance between query q and the code at position + c * stride. query_words(i) returns word i
// of all queries as a Vector<uint32_t, kQueries>. Positions from `end` on are replaced by end - 1; the caller must
// ignore their distances.
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
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const uint32_t word = codes.word(rows[c], i);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) distances[c][q] += __popc(word ^ words.at[q]);
    }
  }
}

// The queries of a block: kQueries from first_query on. Their words are in shared memory, so that one or two loads read
// word i of all of them. If the block has fewer queries, copies of the last one take their place.
template <int kQueries>
struct StagedQueries {
  const DeviceSearch& search;
  int64_t first_query;
  uint32_t* words;  // [word][query]

  // The number of bytes that `words` takes, a multiple of 16.
  static HE_HOST_DEVICE int64_t bytes(int64_t code_bytes) {
    return ceil_div<int64_t>(ceil_div<int64_t>(code_bytes, 4) * kQueries, 4) * 16;
  }

  // Stores the words. Every thread must call; a __syncthreads() must follow before for_each_distance().
  __device__ __forceinline__ StagedQueries(const DeviceSearch& device_search, int64_t first, uint32_t* shared_words)
      : search(device_search), first_query(first), words(shared_words) {
    for (int i = threadIdx.x; i < search.queries.words() * kQueries; i += kCountThreads)
      words[i] = search.queries.word(min(first_query + i % kQueries, search.queries.count - 1), i / kQueries);
  }

  // Calls visit(q, position, distance) for each query first_query + q of the block and each code of [begin, end) that
  // passes the filter of this query. The codes are distributed over the block's threads.
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

template <int kValue>
struct QueriesPerBlock {
  static constexpr int value = kValue;
};

// Calls function(QueriesPerBlock<n>()). n is the largest of 8, 4 and 2 such that there are at least n queries and the
// counters of n queries, `counter_bytes` each, fit in kMaxCounterBytes. If there is no such number, n is 1.
template <typename Function>
void with_queries_per_block(int64_t queries, int64_t counter_bytes, Function function) {
  const auto fits = [&](int64_t count) { return count <= queries && count * counter_bytes <= kMaxCounterBytes; };
  if (fits(8)) return function(QueriesPerBlock<8>());
  if (fits(4)) return function(QueriesPerBlock<4>());
  if (fits(2)) return function(QueriesPerBlock<2>());
  function(QueriesPerBlock<1>());
}

}  // namespace hashengine
