// Triplet attention's gate on the GPU: y = x times the mean of the branches' gates, and in training the index of each
// maximum. See triplet_apply.cuh for the traffic, triplet_maxima.cuh for the indices.
//
// Instructions, a bfloat16 element: conversion 1, gates 2, product and rounding 1.5, indices 8, loads and stores 1; an
// H200 issues 24 in the time that it loads and stores one.
//
// Numerics. Arithmetic in float32 (float64 for float64), rounded once.

#include "triplet_maxima.cuh"

namespace hashengine {
namespace {

// An Apply of triplet_apply_kernel: `in` and `out` are what it reads and writes, prepare tells what all values of a map
// have in common, load fills in what is kept of a value and the index to begin with, apply makes a vector's results,
// and flush takes an index back.
template <typename T, bool kTraining>
struct TripletGate {
  using Element = T;
  using Real = Arithmetic<T>;
  static constexpr int kFields = kTraining ? 2 : 1;  // the gate, the maximum
  static constexpr int kBlocks = kTraining ? 2 : 3;  // that a multiprocessor has room for
  static constexpr bool kReads = true, kWrites = true, kHasIndex = kTraining, kFindsIndex = kTraining;

  const T* in;
  T* out;
  GateMaps<Real> maps;
  const Real* pooled;
  int32_t* index;
  bool shares_index[3];  // several blocks, or slots of one, have parts of a line

  template <int kAxis>
  __device__ __forceinline__ GateFormula<Real> prepare() const {
    return maps.template formula<kAxis>();
  }
  template <int kAxis, typename Set>
  __device__ __forceinline__ void load(const GateFormula<Real>& formula, int64_t sample, int64_t outer, int64_t inner,
                                       Set set, int32_t& found) const {
    const GateMap<Real>& map = maps.axis[kAxis];
    const bool exists = map.branch >= 0;
    set(0, exists ? maps.share * formula.gate(maps.response[map.offset(sample, outer, inner)]) : Real(0));
    if constexpr (kTraining) {
      set(1, exists ? pooled[map.offset_of_two(sample, outer, inner)] : Real(NAN));  // nothing equals a NaN
      found = kNoMaximum;
    }
  }

  template <int kWidth>
  __device__ __forceinline__ void apply(Vector<T, kWidth>& vector, MapValues<TripletGate, kWidth>& kept,
                                        const MapRun<TripletGate>& run, const VectorPlace& place) const {
    const Vector<Real, kWidth> gates = vector_at<kWidth>(run.field(0), place.column_at);
    const Real row_gate = run.field(0)[place.row_at];
    if constexpr (kTraining) note_maxima<1>(vector, kept, run, place);
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      vector.at[i] = narrow<T>(widen(vector.at[i]) * (kept.field[0].at[i] + gates.at[i] + row_gate));
  }

  template <int kAxis>
  __device__ __forceinline__ void flush(int64_t sample, int64_t outer, int64_t inner, int32_t found) const {
    const GateMap<Real>& map = maps.axis[kAxis];
    if (map.branch < 0) return;
    int32_t* at = &index[map.offset(sample, outer, inner)];
    if (!shares_index[kAxis]) {
      *at = found;
    } else if (found != kNoMaximum) {
      atomicMin(at, found);
    }
  }
};

}  // namespace

template <typename Real>
void launch_triplet_gate(const void* x, void* y, const GateMaps<Real>& maps, const Real* pooled, int32_t* index,
                         Dtype dtype, const TripletGeometry& geometry, const TripletCut& cut, cudaStream_t stream) {
  with_element<Real>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const auto* in = static_cast<const T*>(x);
    auto* out = static_cast<T*>(y);
    if (index) {
      const TripletGate<T, true> gate{in, out, maps, pooled, index, {true, cut.is_shared(1), cut.is_shared(2)}};
      launch_triplet_apply(gate, geometry, cut, stream);
    } else {
      launch_triplet_apply(TripletGate<T, false>{in, out, maps, nullptr, nullptr, {}}, geometry, cut, stream);
    }
  });
}

template void launch_triplet_gate(const void*, void*, const GateMaps<float>&, const float*, int32_t*, Dtype,
                                  const TripletGeometry&, const TripletCut&, cudaStream_t);
template void launch_triplet_gate(const void*, void*, const GateMaps<double>&, const double*, int32_t*, Dtype,
                                  const TripletGeometry&, const TripletCut&, cudaStream_t);

}  // namespace hashengine
