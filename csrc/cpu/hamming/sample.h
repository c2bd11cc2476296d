#pragma once

#include <vector>

#include "hashengine/hamming.h"

namespace hashengine {

// Estimates a bound for each query from a sample of the codes. Of the codes that pass the filter, very
// probably at least k, and not many more than k, have a distance below the bound. If a sample does not repay its cost
// or contains too few codes that pass the filter, the bound is distance_count(), which excludes nothing.
std::vector<uint32_t> sample_bounds(const HammingSearch& search, int64_t k, SimdLevel level, const ThreadPool& pool);

}  // namespace hashengine
