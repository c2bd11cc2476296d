#pragma once

#include <vector>

#include "hashengine/hamming.h"

namespace hashengine {

// For each query a bound, measured on a sample, below which probably lie at least k of the codes that count for it, and
// not many more; bits + 1 where a sample is not worth its time or shows too few.
std::vector<uint32_t> sample_bounds(const HammingSearch& search, int64_t k, SimdLevel level, const ThreadPool& pool);

}  // namespace hashengine
