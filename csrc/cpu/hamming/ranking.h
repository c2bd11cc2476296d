#pragma once

#include "hashengine/hamming.h"

namespace hashengine {

// Does the same as hamming_topk_cpu, but ranks all codes by counting. This is faster if k is a large part of the number
// of codes. The scratch memory does not grow with k.
void hamming_rank(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions, SimdLevel level,
                  const ThreadPool& pool);

}  // namespace hashengine
