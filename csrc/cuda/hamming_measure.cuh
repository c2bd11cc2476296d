// Distances of codes from a few queries at a time, for the kernels that count them.
#pragma once

#include "hamming_code.cuh"
#include "reduce.cuh"

namespace hashengine {

using Count = unsigned long long;  // 64 bits, in the type that atomics take

constexpr int kCountThreads = 256;
constexpr int kCountBlocks = 3;  // that a multiprocessor has registers for
// Of shared memory, for what a block counts: 1,025 counters of eight queries, those of 1,024 bits, and not much more,
// so that a multiprocessor holds several blocks.
constexpr int64_t kCounterBytes = 36 << 10;

// Codes that a thread measures at a time: enough loads under way, and no more distances than registers.
template <int kQueries>
constexpr int kCodesAtOnce = kQueries == 8 ? 2 : 4;

// distances[c][q]: of the code at position + c * stride from query q of those whose words `queries(i)` gives, a
// Vector<uint32_t, kQueries> for word i. A position behind `end` is measured as the last before it, for the caller to
// ignore.
template <int kQueries, int kCodes, typename Queries>
__device__ __forceinline__ void measure(const CodeRows& codes, int64_t position, int stride, int64_t end,
                                        Queries queries, int (&distances)[kCodes][kQueries]) {
  int64_t rows[kCodes];
#pragma unroll
  for (int c = 0; c < kCodes; ++c) {
    rows[c] = min(position + c * stride, end - 1);
#pragma unroll
    for (int q = 0; q < kQueries; ++q) distances[c][q] = 0;
  }
  for (int i = 0; i < codes.words(); ++i) {
    const Vector<uint32_t, kQueries> of_queries = queries(i);
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const uint32_t word = codes.word(rows[c], i);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) distances[c][q] += __popc(word ^ of_queries.at[q]);
    }
  }
}

// The queries of a block, first_query and those after it, and what the block measures them against. Their words are in
// shared memory, so that a few loads give those of all; of a query beyond the last they are the last's.
template <int kQueries>
struct QueryBlock {
  const DeviceSearch& search;
  int64_t first_query;
  uint32_t* words;  // [word, query]; after them is room for the caller

  static HE_HOST_DEVICE int64_t bytes(int64_t code_bytes) {
    return ceil_div<int64_t>(ceil_div<int64_t>(code_bytes, 4) * kQueries, 4) * 16;
  }

  // Every thread must call, and none may look at a distance before a __syncthreads.
  __device__ __forceinline__ QueryBlock(const DeviceSearch& search, int64_t first_query, uint32_t* words)
      : search(search), first_query(first_query), words(words) {
    for (int i = threadIdx.x; i < search.queries.words() * kQueries; i += kCountThreads)
      words[i] = search.queries.word(min(first_query + i % kQueries, search.queries.count - 1), i / kQueries);
  }

  // visit(q, position, distance) for each code of [begin, end) that query first_query + q may find, the block's threads
  // sharing the codes.
  template <typename Visit>
  __device__ __forceinline__ void for_each_distance(int64_t begin, int64_t end, Visit visit) const {
    constexpr int kCodes = kCodesAtOnce<kQueries>;
    const auto queries = [this](int i) { return vector_at<kQueries>(words, int64_t{i} * kQueries); };
    for (int64_t position = begin + threadIdx.x; position < end; position += kCodes * kCountThreads) {
      int distances[kCodes][kQueries];
      measure(search.codes, position, kCountThreads, end, queries, distances);
#pragma unroll
      for (int c = 0; c < kCodes; ++c) {
        const int64_t at = position + c * kCountThreads;
        if (at >= end) break;
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          const int64_t query = first_query + q;
          if (query < search.queries.count && search.may_find(query, at)) visit(q, at, distances[c][q]);
        }
      }
    }
  }
};

template <int kValue>
struct QueriesOfABlock {
  static constexpr int value = kValue;
};

// Calls function(QueriesOfABlock<n>()) with the most queries, up to eight, that there are and whose counters, of
// `counter_bytes` each, fit in shared memory; with one where those of none do.
template <typename Function>
void with_queries_of_a_block(int64_t queries, int64_t counter_bytes, Function function) {
  const auto takes = [&](int64_t count) { return count <= queries && count * counter_bytes <= kCounterBytes; };
  if (takes(8)) return function(QueriesOfABlock<8>());
  if (takes(4)) return function(QueriesOfABlock<4>());
  if (takes(2)) return function(QueriesOfABlock<2>());
  function(QueriesOfABlock<1>());
}

}  // namespace hashengine
