// How the triplet ops lay out their scratch, and what depends on the pointers that they are given.
#pragma once

#include <algorithm>

#include "triplet_kernels.h"

namespace hashengine {

// Hands out an array after another; over null it measures.
class Arena {
 public:
  explicit Arena(void* memory) : begin_(reinterpret_cast<uintptr_t>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(begin_ + used_);
    used_ += ceil_div<int64_t>(count * static_cast<int64_t>(sizeof(T)), kVectorBytes) * kVectorBytes;
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  uintptr_t begin_;
  int64_t used_ = 0;
};

// Calls function(Real()) with the type of the maps.
template <typename Function>
auto with_real(Dtype dtype, Function function) {
  return dtype == Dtype::kFloat64 ? function(double()) : function(float());
}

// The maps that a reduction writes, in parts, in the arena.
template <typename Real>
AxisMaps<Real> partial_maps(const TripletGeometry& geometry, const TripletTiling& tiling, int channels, Arena& arena) {
  AxisMaps<Real> maps{};
  for (int a = 0; a < 3; ++a) {
    const TripletAxis& axis = geometry.axis[a];
    if (axis.branch < 0) continue;
    const int64_t sample = channels * axis.numel, part = geometry.samples * sample, parts = tiling.parts[a];
    maps.axis[a] = {
        arena.take<Real>(parts * part), static_cast<int>(parts), part, sample, axis.numel, axis.inner_size, Real(1)};
  }
  return maps;
}

// Vectors of the width that the shape allows, or single elements where an array is not aligned.
inline int vector_width(const TripletGeometry& geometry, Dtype dtype, const void* x, const void* y) {
  return is_aligned(x) && is_aligned(y) ? triplet_vector_width(geometry, dtype) : 1;
}

// The most bytes that plan(width, arena) takes for the widths that vector_width gives.
template <typename Plan>
int64_t most_bytes(const TripletShape& shape, Plan plan) {
  Arena vectors(nullptr), elements(nullptr);
  plan(triplet_vector_width(TripletGeometry::of(shape), shape.dtype), vectors);
  plan(1, elements);
  return std::max(vectors.used(), elements.used());
}

}  // namespace hashengine
