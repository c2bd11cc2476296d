// Triplet attention's last backward pass on the GPU: dx from dy, through the gate, through each branch's mean, and
// through its maximum where the element is the one. See triplet_apply.cuh for the traffic.
//
// Instructions, a bfloat16 element: conversion 1, gates and means 5, maxima 6, rounding 0.5, loads and stores 1.5; an
// H200 issues 24 in the time that it loads and stores one.
//
// Numerics. Arithmetic in float32 (float64 for float64), rounded once.

#include "triplet_apply.cuh"

namespace hashengine {
namespace {

// An Apply as TripletGate in triplet_gate.cu is.
template <typename T>
struct TripletGateBackward {
  using Element = T;
  using Real = Arithmetic<T>;
  static constexpr int kFields = 3;  // the gate, the gradients through the mean and to the maximum
  static constexpr int kBlocks = 2;
  static constexpr bool kReads = true, kWrites = true, kHasIndex = true, kFindsIndex = false;

  const T* in;
  T* out;
  GateMaps<Real> maps;
  const Real* grad_pooled;
  const int32_t* index;

  template <int kAxis>
  __device__ __forceinline__ GateFormula<Real> prepare() const {
    return maps.template formula<kAxis>();
  }
  template <int kAxis, typename Set>
  __device__ __forceinline__ void load(const GateFormula<Real>& formula, int64_t sample, int64_t outer, int64_t inner,
                                       Set set, int32_t& position) const {
    const GateMap<Real>& map = maps.axis[kAxis];
    const bool exists = map.branch >= 0;
    const int64_t at = map.offset(sample, outer, inner), at_maximum = map.offset_of_two(sample, outer, inner);
    set(0, exists ? maps.share * formula.gate(maps.response[at]) : Real(0));
    set(1, exists ? grad_pooled[at_maximum + map.numel] : Real(0));
    set(2, exists ? grad_pooled[at_maximum] : Real(0));
    position = exists ? index[at] : -1;
  }

  template <int kWidth>
  __device__ __forceinline__ void apply(Vector<T, kWidth>& vector, const MapValues<TripletGateBackward, kWidth>& kept,
                                        const MapRun<TripletGateBackward>& run, const VectorPlace& place) const {
    const auto gates = vector_at<kWidth>(run.field(0), place.column_at);
    const auto means = vector_at<kWidth>(run.field(1), place.column_at);
    const auto maxima = vector_at<kWidth>(run.field(2), place.column_at);
    const auto rows = vector_at<kWidth>(run.index(), place.column_at);
    const Real row_gate = run.field(0)[place.row_at];
    const Real row_mean = run.field(1)[place.row_at];
    const Real row_maximum = run.field(2)[place.row_at];
    const auto row_index = run.index()[place.row_at] - static_cast<int32_t>(place.column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      Real gradient = widen(vector.at[i]) * (kept.field[0].at[i] + gates.at[i] + row_gate);
      gradient += kept.field[1].at[i] + means.at[i] + row_mean;
      if (kept.index.at[i] == static_cast<int32_t>(place.slice)) gradient += kept.field[2].at[i];
      if (rows.at[i] == static_cast<int32_t>(place.row)) gradient += maxima.at[i];
      if (row_index == i) gradient += row_maximum;
      vector.at[i] = narrow<T>(gradient);
    }
  }
};

}  // namespace

template <typename Real>
void launch_triplet_gate_backward(const void* grad_y, void* grad_x, const GateMaps<Real>& maps, const Real* grad_pooled,
                                  const int32_t* index, Dtype dtype, const TripletGeometry& geometry,
                                  const TripletCut& cut, cudaStream_t stream) {
  with_element<Real>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const TripletGateBackward<T> apply{static_cast<const T*>(grad_y), static_cast<T*>(grad_x), maps, grad_pooled,
                                       index};
    launch_triplet_apply(apply, geometry, cut, stream);
  });
}

template void launch_triplet_gate_backward(const void*, void*, const GateMaps<float>&, const float*, const int32_t*,
                                           Dtype, const TripletGeometry&, const TripletCut&, cudaStream_t);
template void launch_triplet_gate_backward(const void*, void*, const GateMaps<double>&, const double*, const int32_t*,
                                           Dtype, const TripletGeometry&, const TripletCut&, cudaStream_t);

}  // namespace hashengine
