// A saved response as the elements see it: the gate it makes, and where it lies for a position of x.
#pragma once

#include <cmath>

#include "triplet_tiles.cuh"

namespace hashengine {

// The gate of a response: sigmoid(BatchNorm(response)).
template <typename Real>
struct GateFormula {
  Real mean;
  Real rstd;
  Real weight;
  Real bias;

  static __device__ __forceinline__ GateFormula of(const Real* mean, const Real* var, const Real* weight,
                                                   const Real* bias, double eps) {
    return {*mean, Real(1) / std::sqrt(*var + static_cast<Real>(eps)), *weight, *bias};
  }
  __device__ __forceinline__ Real normal(Real response) const { return (response - mean) * rstd; }
  __device__ __forceinline__ Real gate(Real response) const {
    return Real(1) / (Real(1) + std::exp(-(normal(response) * weight + bias)));
  }
};

// The saved map that an axis' branch made, addressed in memory's order.
template <typename Real>
struct GateMap {
  int branch;  // or -1
  int64_t begin;
  int64_t numel;
  int64_t outer_stride;
  int64_t inner_stride;
  const Real* bn_weight;
  const Real* bn_bias;

  __device__ __forceinline__ int64_t offset(int64_t sample, int64_t outer, int64_t inner) const {
    return begin + sample * numel + outer * outer_stride + inner * inner_stride;
  }
  // The first channel's value in an array of two channels a sample.
  __device__ __forceinline__ int64_t offset_of_two(int64_t sample, int64_t outer, int64_t inner) const {
    return offset(sample, outer, inner) + begin + sample * numel;
  }
};

template <typename Real>
struct GateMaps {
  GateMap<Real> axis[3];
  const Real* response;
  const Real* mean;
  const Real* var;
  double eps;
  Real share;  // of a branch in the mean gate

  static GateMaps of(const TripletGeometry& geometry, const TripletParameters& parameters, const void* response,
                     const void* mean, const void* var) {
    GateMaps maps{};
    for (int a = 0; a < 3; ++a) {
      const TripletAxis& axis = geometry.axis[a];
      maps.axis[a] = {
          axis.branch, axis.begin, axis.numel, axis.turned ? 1 : axis.inner_size, axis.turned ? axis.outer_size : 1,
          nullptr,     nullptr};
      if (axis.branch < 0) continue;
      maps.axis[a].bn_weight = static_cast<const Real*>(parameters.bn_weight[axis.branch]);
      maps.axis[a].bn_bias = static_cast<const Real*>(parameters.bn_bias[axis.branch]);
    }
    maps.response = static_cast<const Real*>(response);
    maps.mean = static_cast<const Real*>(mean);
    maps.var = static_cast<const Real*>(var);
    maps.eps = parameters.eps;
    maps.share = Real(1) / static_cast<Real>(geometry.branches);
    return maps;
  }

  // Of the branch that pools an axis away, if one does.
  template <int kAxis>
  __device__ __forceinline__ GateFormula<Real> formula() const {
    const GateMap<Real>& map = axis[kAxis];
    if (map.branch < 0) return {};
    return GateFormula<Real>::of(mean + map.branch, var + map.branch, map.bn_weight, map.bn_bias, eps);
  }
};

}  // namespace hashengine
