// The maps as the passes over x or dy see them. The reduce pass (reduce.cu) reduces the elements along each axis and
// writes the results as maps. The apply pass (apply.cuh) combines the elements with the values of maps. If it looks for
// the maxima, it also writes maps of their indices. A map extends over two axes of x. Both passes address its values in
// memory order, by an index on the outer axis and an index on the inner axis (Axis in tiles.cuh). map_tiles.cuh
// has the view of the kernels that process only maps.
#pragma once

#include <climits>
#include <cmath>

#include "cuda/triplet/tiles.cuh"

namespace hashengine::triplet {

constexpr int32_t kNoIndex = INT_MAX;  // larger than every index, so that any index replaces it in a minimum

// --- written by the reduce pass ---

// The map of one axis in parts, one per tile along that axis: [part][sample][channel][outer][inner]. If there are two
// channels, the first is the maximum over the part. The last channel is the sum over the part, multiplied by `scale`.
// With scale = 1 / length of the axis, this is the part's share of the mean. The kernel that reads the map merges the
// parts in their order: it takes the maximum of the maxima and adds up the sums.
template <typename Real>
struct AxisMap {
  Real* data;  // null: no branch pools this axis
  int parts;
  int64_t part_stride;
  int64_t sample_stride;
  int64_t channel_stride;
  int64_t outer_stride;
  Real scale;  // multiplies the sums
};

// The part of the map of one axis that a tile writes.
template <typename Real>
struct TileMap {
  Real* first;  // the value at the tile's first position; null: no branch pools the axis
  int64_t channel_stride;
  int outer_stride;
  Real scale;

  // Stores kWidth values with adjacent inner indices. `outer` and `inner` are relative to the tile.
  template <bool kHasMaximum, int kWidth>
  __device__ __forceinline__ void store(int outer, int inner, const Vector<Real, kWidth>& maxima,
                                        Vector<Real, kWidth> sums) const {
    Real* at = first + int64_t{outer} * outer_stride + inner;
    if constexpr (kHasMaximum) {
      store_vector(maxima, at);
      at += channel_stride;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums.at[i] *= scale;
    store_vector(sums, at);
  }

 private:
  // A saved map can begin at any value, because it follows the maps of other branches.
  template <int kWidth>
  static __device__ __forceinline__ void store_vector(const Vector<Real, kWidth>& values, Real* at) {
    if (is_aligned(at, alignof(Vector<Real, kWidth>))) {
      vector_at<kWidth>(at, 0) = values;
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) at[i] = values.at[i];
    }
  }
};

template <typename Real>
struct AxisMaps {
  AxisMap<Real> axis[3];

  __device__ __forceinline__ TileMap<Real> of_tile(int a, const Tile& tile) const {
    const AxisMap<Real>& map = axis[a];
    const int64_t outer = tile.begin[a == 0 ? 1 : 0], inner = tile.begin[a == 2 ? 1 : 2];
    Real* first = map.data ? map.data + tile.index[a] * map.part_stride + tile.sample * map.sample_stride +
                                 outer * map.outer_stride + inner
                           : nullptr;
    return {first, map.channel_stride, static_cast<int>(map.outer_stride), map.scale};
  }
};

// --- used by the apply passes of triplet_attention: they compute the gates from the responses ---

template <typename Real>
__device__ __forceinline__ Real sigmoid(Real value) {
  return Real(1) / (Real(1) + std::exp(-value));
}

// The gate of a response: sigmoid(BatchNorm(response)).
template <typename Real>
struct GateFunction {
  Real mean;
  Real rstd;  // 1 / sqrt(variance + eps)
  Real weight;
  Real bias;

  static __device__ __forceinline__ GateFunction load(const Real* mean, const Real* var, const Real* weight,
                                                      const Real* bias, double eps) {
    return {*mean, Real(1) / std::sqrt(*var + static_cast<Real>(eps)), *weight, *bias};
  }
  __device__ __forceinline__ Real normalized(Real response) const { return (response - mean) * rstd; }
  __device__ __forceinline__ Real gate(Real response) const { return sigmoid(normalized(response) * weight + bias); }
};

// The place of one axis's map in the flat arrays, which contain the maps of all branches one after another.
template <typename Real>
struct GateMap {
  int branch;  // -1: no branch pools this axis
  int64_t flat_begin;
  int64_t numel;  // per sample
  int64_t outer_stride;
  int64_t inner_stride;
  const Real* bn_weight;
  const Real* bn_bias;

  // The offset of a value in a flat array of one channel.
  __device__ __forceinline__ int64_t offset(int64_t sample, int64_t outer, int64_t inner) const {
    return flat_begin + sample * numel + outer * outer_stride + inner * inner_stride;
  }
  // The offset of a value of the first channel in a flat array of two channels. The value of the second channel is
  // `numel` further.
  __device__ __forceinline__ int64_t offset_of_two(int64_t sample, int64_t outer, int64_t inner) const {
    return offset(sample, outer, inner) + flat_begin + sample * numel;
  }
};

template <typename Real>
struct GateMaps {
  GateMap<Real> axis[3];
  const Real* response;
  const Real* mean;
  const Real* var;
  double eps;
  Real branch_weight;  // 1 / number of branches

  static GateMaps make(const Geometry& geometry, const TripletParameters& parameters, const void* response,
                       const void* mean, const void* var) {
    GateMaps maps{};
    for (int a = 0; a < 3; ++a) {
      const Axis& axis = geometry.axis[a];
      GateMap<Real>& map = maps.axis[a];
      map.branch = axis.branch;
      map.flat_begin = axis.flat_begin;
      map.numel = axis.numel;
      map.outer_stride = axis.transposed ? 1 : axis.inner_size;
      map.inner_stride = axis.transposed ? axis.outer_size : 1;
      if (axis.branch < 0) continue;
      map.bn_weight = static_cast<const Real*>(parameters.bn_weight[axis.branch]);
      map.bn_bias = static_cast<const Real*>(parameters.bn_bias[axis.branch]);
    }
    maps.response = static_cast<const Real*>(response);
    maps.mean = static_cast<const Real*>(mean);
    maps.var = static_cast<const Real*>(var);
    maps.eps = parameters.eps;
    maps.branch_weight = Real(1) / static_cast<Real>(geometry.branches);
    return maps;
  }

  // The gate function of the branch that pools axis kAxis; all fields are zero if there is no such branch.
  template <int kAxis>
  __device__ __forceinline__ GateFunction<Real> gate_function() const {
    const GateMap<Real>& map = axis[kAxis];
    if (map.branch < 0) return {};
    return GateFunction<Real>::load(mean + map.branch, var + map.branch, map.bn_weight, map.bn_bias, eps);
  }
};

// --- used by the apply passes of triplet_gate and triplet_pool: maps that the caller passes, one array per branch. In
// the forward of triplet_pool, the apply pass also writes such maps, those of the indices ---

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

  // `data`: one pointer per branch, each to a map of `channels` channels.
  template <typename Pointer>
  static MapViews make(const Geometry& geometry, Pointer const (&data)[kTripletBranches], int channels) {
    MapViews views{};
    for (int a = 0; a < 3; ++a) {
      const Axis& axis = geometry.axis[a];
      if (axis.branch < 0) continue;
      views.axis[a] = {static_cast<T*>(data[axis.branch]), channels * axis.numel, axis.transposed ? 1 : axis.inner_size,
                       axis.transposed ? axis.outer_size : 1};
    }
    return views;
  }
};

}  // namespace hashengine::triplet
