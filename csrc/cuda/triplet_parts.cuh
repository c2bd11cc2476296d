// What the kernels of triplet_pool and triplet_gate, triplet attention in parts, share: a map an array, as callers hold
// them, where triplet attention itself has its maps flat.
#pragma once

#include <cmath>

#include "triplet_workspace.h"

namespace hashengine {

// The map that an axis' branch made, addressed in memory's order.
template <typename T>
struct MapView {
  T* data;  // null: no branch pools this axis
  int64_t sample_stride;
  int64_t outer_stride;
  int64_t inner_stride;

  __device__ __forceinline__ T* at(int64_t sample, int64_t outer, int64_t inner) const {
    return data + sample * sample_stride + outer * outer_stride + inner * inner_stride;
  }
};

template <typename T>
struct MapViews {
  MapView<T> axis[3];

  // A pointer a branch, to maps of one channel or two.
  template <typename Pointer>
  static MapViews of(const TripletGeometry& geometry, Pointer const (&data)[kTripletBranches], int channels) {
    MapViews views{};
    for (int a = 0; a < 3; ++a) {
      const TripletAxis& axis = geometry.axis[a];
      if (axis.branch < 0) continue;
      views.axis[a] = {static_cast<T*>(data[axis.branch]), channels * axis.numel, axis.turned ? 1 : axis.inner_size,
                       axis.turned ? axis.outer_size : 1};
    }
    return views;
  }
};

// A pointer a branch, for a kernel over maps: constant indices, so that the parameters need not move to local memory.
template <typename T>
struct BranchPointers {
  T* branch[kTripletBranches];

  template <typename Pointer>
  static BranchPointers of(Pointer const (&data)[kTripletBranches]) {
    BranchPointers pointers;
    for (int b = 0; b < kTripletBranches; ++b) pointers.branch[b] = static_cast<T*>(data[b]);
    return pointers;
  }
  __device__ __forceinline__ T* operator[](int of) const {
    T* pointer = branch[0];
#pragma unroll
    for (int b = 1; b < kTripletBranches; ++b)
      if (b == of) pointer = branch[b];
    return pointer;
  }
};

// The maps without convolution and BatchNorm, for a kernel that goes over their values.
template <typename Real>
BranchMaps<Real> plain_maps(const TripletGeometry& geometry, TripletShape shape, const AxisMaps<Real>& sources) {
  shape.kernel_size = 1;
  return BranchMaps<Real>::of(geometry, shape, {}, sources, 1);
}

template <typename Real>
__device__ __forceinline__ Real sigmoid(Real value) {
  return Real(1) / (Real(1) + std::exp(-value));
}

}  // namespace hashengine
