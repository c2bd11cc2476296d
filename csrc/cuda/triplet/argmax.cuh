// The index of the maximum of each line. A line is the elements of x along a pooled axis that give one value of its
// map. The apply passes that read x find the indices.
//
// Idea. The maximum of a line is known when the apply pass runs, so its index is that of the first element that equals
// it. The apply pass has x in registers anyway; therefore the reduce pass does not find indices. x is
// [samples][A0][A1][A2] (tiles.cuh). A thread keeps the indices of the map that pools A0 in registers. Those of the
// other maps are minima in shared memory, updated by an atomicMin. Only the elements that equal a maximum, few per
// line, execute this atomicMin. If a line is divided among several blocks or slots, an atomicMin on device memory
// merges their results. The lowest index wins in any order of execution, so every run gives the same result. If the
// maximum is NaN, its index is that of the first NaN.
#pragma once

#include "cuda/triplet/apply.cuh"

namespace hashengine::triplet {

// Compares the elements of a vector with the maxima of their lines, and updates the indices. Field kField holds the
// maxima, or NaN for a map whose index is not needed.
template <int kField, typename Apply, int kWidth>
__device__ __forceinline__ void update_argmax(const Vector<typename Apply::Element, kWidth>& vector,
                                              MapValues<Apply, kWidth>& own, const MapCache<Apply>& cache,
                                              const VectorPlace& place) {
  using Real = typename Apply::Real;
  const Vector<Real, kWidth> column_largest = vector_at<kWidth>(cache.field(kField), place.column_at);
  const Real row_largest = cache.field(kField)[place.row_at];
  const auto slice = static_cast<int32_t>(place.slice);
  unsigned column_hits = 0, row_hits = 0;  // one bit per element
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const Real x = widen_at(vector, i);
    const bool is_nan = x != x;
    if ((x == own.field[kField].at[i] || is_nan) && slice < own.index.at[i]) own.index.at[i] = slice;
    if (x == column_largest.at[i] || is_nan) column_hits |= 1u << i;
    if (x == row_largest || is_nan) row_hits |= 1u << i;
  }
  if (row_hits) atomicMin(&cache.index()[place.row_at], static_cast<int32_t>(place.column) + __ffs(row_hits) - 1);
  for (; column_hits; column_hits &= column_hits - 1)
    atomicMin(&cache.index()[place.column_at + __ffs(column_hits) - 1], static_cast<int32_t>(place.row));
}

}  // namespace hashengine::triplet
