// Where the maxima lie: an Apply (triplet_apply.cuh) that reads x finds them on its way.
//
// Idea. An element that equals the maximum of its line is the maximum; x is in registers anyway, so the pooling pass
// need not carry indices. The A0 map's are kept in registers, the others' least is found by atomicMin in shared memory,
// which only the 1 in 50 elements that are a maximum reach; where several blocks have parts of one line, an atomicMin
// on device memory joins them. The lowest index wins whatever the order, so every run gives the same. A NaN maximum
// belongs to the first NaN.
#pragma once

#include <climits>

#include "triplet_apply.cuh"

namespace hashengine {

constexpr int32_t kNoMaximum = INT_MAX;  // before one is found

// Notes the maxima among a vector's elements; field kField holds the lines' maxima, NaN where none is wanted.
template <int kField, typename Apply, int kWidth>
__device__ __forceinline__ void note_maxima(const Vector<typename Apply::Element, kWidth>& vector,
                                            MapValues<Apply, kWidth>& kept, const MapRun<Apply>& run,
                                            const VectorPlace& place) {
  using Real = typename Apply::Real;
  const Vector<Real, kWidth> largest = vector_at<kWidth>(run.field(kField), place.column_at);
  const Real row_largest = run.field(kField)[place.row_at];
  const auto slice = static_cast<int32_t>(place.slice);
  unsigned column_hits = 0, row_hits = 0;  // a bit an element
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const Real x = widen(vector.at[i]);
    const bool is_nan = x != x;
    if ((x == kept.field[kField].at[i] || is_nan) && slice < kept.index.at[i]) kept.index.at[i] = slice;
    if (x == largest.at[i] || is_nan) column_hits |= 1u << i;
    if (x == row_largest || is_nan) row_hits |= 1u << i;
  }
  if (row_hits) atomicMin(&run.index()[place.row_at], static_cast<int32_t>(place.column) + __ffs(row_hits) - 1);
  for (; column_hits; column_hits &= column_hits - 1)
    atomicMin(&run.index()[place.column_at + __ffs(column_hits) - 1], static_cast<int32_t>(place.row));
}

}  // namespace hashengine
