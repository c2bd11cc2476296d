#pragma once

#include "hashengine/hamming.h"

namespace hashengine {

constexpr int64_t kMinRanked = 4096;  // a shorter ranking is not worth a second pass

// hamming_topk_cpu for a large part of the codes, by counting: a first pass over the codes counts each distance, which
// tells where in the ranking each begins, a second writes every code to its place. Memory does not grow with k.
void hamming_rank(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions, SimdLevel level,
                  const ThreadPool& pool);

}  // namespace hashengine
