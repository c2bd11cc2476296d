// hamming_topk: the k nearest packed codes of each query, by (distance, position). d(q, x) = popcount(q ^ x).
#pragma once

#include <cstdint>

#include "hashengine/parallel.h"
#include "hashengine/simd_level.h"

namespace hashengine {

struct HammingTopk {
  const uint8_t* queries;  // [query_count, code_bytes]
  const uint8_t* codes;    // [code_count, code_bytes]
  int64_t query_count;
  int64_t code_count;
  int64_t code_bytes;
  int64_t k;           // 1 to code_count
  int32_t* distances;  // [query_count, k]
  int64_t* positions;  // [query_count, k]
};

void hamming_topk_cpu(const HammingTopk& params, SimdLevel level, const ThreadPool& pool);

}  // namespace hashengine
