// A Hamming search on the device: reads packed codes as 32-bit words, computes exact distances, and reads the filter.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/vec.cuh"
#include "hashengine/hamming.h"
#include "hashengine/types.h"

namespace hashengine {

// Packed codes, one per row of `bytes` bytes. Rows that consist of whole, aligned words are read word by word, other
// rows byte by byte.
struct CodeRows {
  const uint8_t* rows;
  int64_t count;
  int bytes;  // per code
  bool has_whole_words;

  CodeRows(const uint8_t* codes, int64_t code_count, int64_t code_bytes)
      : rows(codes),
        count(code_count),
        bytes(static_cast<int>(code_bytes)),
        has_whole_words(code_bytes % 4 == 0 && is_aligned(codes, 4)) {}

  HE_HOST_DEVICE int words() const { return ceil_div(bytes, 4); }

  // Word `word` of a row; requires has_whole_words. word() has a second branch, which reads bytes. That branch
  // would keep the compiler from issuing consecutive loads together.
  __device__ __forceinline__ uint32_t whole_word(int64_t row, int word) const {
    return __ldg(reinterpret_cast<const uint32_t*>(rows + row * bytes + 4 * word));
  }

  // Word `word` of any row. Bits after the end of the code are zero.
  __device__ __forceinline__ uint32_t word(int64_t row, int word) const {
    const uint8_t* const begin = rows + row * bytes + 4 * word;
    if (has_whole_words) return __ldg(reinterpret_cast<const uint32_t*>(begin));
    uint32_t value = 0;
#pragma unroll 1  // the loop runs rarely, so unrolling it is not worth the registers
    for (int i = 0; i < min(4, bytes - 4 * word); ++i) value |= static_cast<uint32_t>(__ldg(begin + i)) << 8 * i;
    return value;
  }
};

// The fields of a HammingSearch, with the functions that kernels need.
struct DeviceSearch {
  CodeRows queries, codes;
  const uint8_t* filter;  // see HammingSearch
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

  // Whether the filter lets the query find the code at this position.
  __device__ __forceinline__ bool passes_filter(int64_t query, int64_t position) const {
    return filter == nullptr || (__ldg(filter + query * filter_stride + position / 8) >> position % 8 & 1) != 0;
  }
};

}  // namespace hashengine
