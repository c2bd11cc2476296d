// Packed codes on the GPU: rows of bytes read as 32-bit words, distances, and the bitmap of a filter.
#pragma once

#include <cuda_runtime.h>

#include "hashengine/hamming.h"
#include "hashengine/types.h"
#include "vec.cuh"

namespace hashengine {

// Codes of `bytes` bytes, row after row. Rows of whole aligned words are read word by word, others byte by byte.
struct CodeRows {
  const uint8_t* rows;
  int64_t count;
  int bytes;
  bool has_whole_words;

  CodeRows(const uint8_t* rows, int64_t count, int64_t bytes)
      : rows(rows), count(count), bytes(int(bytes)), has_whole_words(bytes % 4 == 0 && is_aligned(rows, 4)) {}

  HE_HOST_DEVICE int words() const { return ceil_div(bytes, 4); }

  // Where has_whole_words. Apart from word(), so that loads that follow each other are not kept apart by the bytes'
  // way.
  __device__ __forceinline__ uint32_t whole_word(int64_t row, int word) const {
    return __ldg(reinterpret_cast<const uint32_t*>(rows + row * bytes + 4 * word));
  }

  // Bits behind the end of a code are zero.
  __device__ __forceinline__ uint32_t word(int64_t row, int word) const {
    const uint8_t* const from = rows + row * bytes + 4 * word;
    if (has_whole_words) return __ldg(reinterpret_cast<const uint32_t*>(from));
    uint32_t value = 0;
#pragma unroll 1  // rare, and not worth the registers
    for (int i = 0; i < min(4, bytes - 4 * word); ++i) value |= static_cast<uint32_t>(__ldg(from + i)) << 8 * i;
    return value;
  }
};

// What a search reads.
struct DeviceSearch {
  CodeRows queries, codes;
  const uint8_t* filter;  // as in HammingSearch
  int64_t filter_stride;

  explicit DeviceSearch(const HammingSearch& search)
      : queries(search.queries, search.query_count, search.code_bytes),
        codes(search.codes, search.code_count, search.code_bytes),
        filter(search.filter),
        filter_stride(search.filter_stride) {}

  HE_HOST_DEVICE int bits() const { return 8 * codes.bytes; }

  __device__ __forceinline__ int distance(int64_t query, int64_t position) const {
    int sum = 0;
    for (int i = 0; i < codes.words(); ++i) sum += __popc(queries.word(query, i) ^ codes.word(position, i));
    return sum;
  }

  // Whether the filter lets the query find this code.
  __device__ __forceinline__ bool may_find(int64_t query, int64_t position) const {
    return filter == nullptr || (__ldg(filter + query * filter_stride + position / 8) >> position % 8 & 1) != 0;
  }
};

}  // namespace hashengine
