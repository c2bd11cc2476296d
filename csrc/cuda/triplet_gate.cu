// Triplet attention's gate on the GPU: y = x times the mean of the branches' gates, and in training the index of each
// maximum. See triplet_apply.cuh for the traffic.
//
// Idea of the indices. An element that equals the maximum of its line is the maximum; x is in registers here anyway, so
// the pooling pass need not carry indices. The A0 map's are kept in registers, the others' least is found by atomicMin
// in shared memory, which only the 1 in 50 elements that are a maximum reach; a block stores its lines, and uses
// atomicMin on device memory where several blocks have parts of one line. The lowest index wins whatever the order, so
// every run gives the same. A NaN maximum belongs to the first NaN.
//
// Instructions, a bfloat16 element: conversion 1, gates 2, product and rounding 1.5, indices 8, loads and stores 1; an
// H200 issues 24 in the time that it loads and stores one.
//
// Numerics. Arithmetic in float32 (float64 for float64), rounded once.

#include <climits>

#include "triplet_apply.cuh"

namespace hashengine {
namespace {

// An Apply of triplet_apply_kernel: `in` and `out` are what it reads and writes, load fills in what is kept of a map's
// value and the index to begin with, apply makes a vector's results, and flush takes an index back.
template <typename T, bool kTraining>
struct TripletGate {
  using Element = T;
  using Real = Arithmetic<T>;
  static constexpr int kFields = kTraining ? 2 : 1;  // the gate, the maximum
  static constexpr int kBlocks = kTraining ? 2 : 3;  // that a multiprocessor has room for
  static constexpr bool kHasIndex = kTraining, kFindsIndex = kTraining;

  const T* in;
  T* out;
  GateMaps<Real> maps;
  const Real* pooled;
  int32_t* index;
  bool shares_index[3];  // several blocks, or slots of one, have parts of a line

  template <int kAxis, typename Set>
  __device__ __forceinline__ void load(const GateFormula<Real>& formula, int64_t sample, int64_t outer, int64_t inner,
                                       Set set, int32_t& found) const {
    const GateMap<Real>& map = maps.axis[kAxis];
    const bool exists = map.branch >= 0;
    set(0, exists ? maps.share * formula.gate(maps.response[map.offset(sample, outer, inner)]) : Real(0));
    if constexpr (kTraining) {
      set(1, exists ? pooled[map.offset_of_two(sample, outer, inner)] : Real(NAN));  // nothing equals a NaN
      found = INT_MAX;
    }
  }

  template <int kWidth>
  __device__ __forceinline__ void apply(Vector<T, kWidth>& vector, MapValues<TripletGate, kWidth>& kept,
                                        const MapRun<TripletGate>& run, const VectorPlace& place) const {
    const Vector<Real, kWidth> gates = vector_at<kWidth>(run.field(0), place.column_at);
    const Real row_gate = run.field(0)[place.row_at];
    Vector<Real, kWidth> largest;
    Real row_largest = 0;
    if constexpr (kTraining) {
      largest = vector_at<kWidth>(run.field(1), place.column_at);
      row_largest = run.field(1)[place.row_at];
    }
    const auto slice = static_cast<int32_t>(place.slice);
    unsigned column_hits = 0, row_hits = 0;  // a bit an element
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Real x = widen(vector.at[i]);
      vector.at[i] = narrow<T>(x * (kept.field[0].at[i] + gates.at[i] + row_gate));
      if constexpr (kTraining) {
        const bool is_nan = x != x;
        if ((x == kept.field[1].at[i] || is_nan) && slice < kept.index.at[i]) kept.index.at[i] = slice;
        if (x == largest.at[i] || is_nan) column_hits |= 1u << i;
        if (x == row_largest || is_nan) row_hits |= 1u << i;
      }
    }
    if (row_hits) atomicMin(&run.index()[place.row_at], static_cast<int32_t>(place.column) + __ffs(row_hits) - 1);
    for (; column_hits; column_hits &= column_hits - 1)
      atomicMin(&run.index()[place.column_at + __ffs(column_hits) - 1], static_cast<int32_t>(place.row));
  }

  template <int kAxis>
  __device__ __forceinline__ void flush(int64_t sample, int64_t outer, int64_t inner, int32_t found) const {
    const GateMap<Real>& map = maps.axis[kAxis];
    if (map.branch < 0) return;
    int32_t* at = &index[map.offset(sample, outer, inner)];
    if (!shares_index[kAxis]) {
      *at = found;
    } else if (found != INT_MAX) {
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
      const TripletGate<T, true> gate{in,     out,   maps,
                                      pooled, index, {true, cut.is_shared(1), cut.is_shared(2)}};
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
