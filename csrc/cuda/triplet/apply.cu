// The two apply passes of triplet_attention (apply.cuh). The gate pass computes y = x * (mean of the gates of the
// branches). If the maps are saved for the backward, it also finds the index of each maximum (argmax.cuh). The gate
// backward computes dx from dy. dx has a term through the gates, a term through the mean of each branch and, for an
// element that is a maximum, a term through this maximum.
//
// Instructions per bfloat16 element. The gate pass takes 1 for the conversion, 2 for the gates, 1.5 for the product and
// the rounding, 8 for the indices, and 1 for loads and stores. The gate backward takes 1 for the conversion, 5 for
// gates and means, 6 for the maxima, 0.5 for the rounding, and 1.5 for loads and stores. Estimate: in the time that an
// H200 needs to load and store one element, it issues 24 instructions.
//
// Numerics. Arithmetic in float32 (float64 for float64), rounded once.

#include "cuda/triplet/apply.cuh"
#include "cuda/triplet/argmax.cuh"
#include "cuda/triplet/passes.h"

namespace hashengine::triplet {
namespace {

template <typename T, bool kSavesIndex>
struct ApplyGate {
  using Element = T;
  using Real = Arithmetic<T>;
  static constexpr int kFields = kSavesIndex ? 2 : 1;  // gate / branches and, if kSavesIndex, the maximum
  static constexpr int kBlocksPerSm = kSavesIndex ? 2 : 3;
  static constexpr bool kReads = true, kWrites = true, kHasIndex = kSavesIndex, kFindsIndex = kSavesIndex;

  const T* in;
  T* out;
  GateMaps<Real> maps;
  const Real* pooled;
  int32_t* index;
  // Per axis: whether several blocks, or several slots of a block (tiles.cuh), process parts of one line along the
  // axis.
  bool shares_index[3];

  template <int kAxis>
  __device__ __forceinline__ GateFunction<Real> prepare() const {
    return maps.template gate_function<kAxis>();
  }
  template <int kAxis, typename Set>
  __device__ __forceinline__ void load(const GateFunction<Real>& function, int64_t sample, int64_t outer, int64_t inner,
                                       Set set, int32_t& found) const {
    const GateMap<Real>& map = maps.axis[kAxis];
    const bool exists = map.branch >= 0;
    set(0, exists ? maps.branch_weight * function.gate(maps.response[map.offset(sample, outer, inner)]) : Real(0));
    if constexpr (kSavesIndex) {
      set(1, exists ? pooled[map.offset_of_two(sample, outer, inner)] : Real(NAN));  // NaN equals no element
      found = kNoIndex;
    }
  }

  template <int kWidth>
  __device__ __forceinline__ void apply(Vector<T, kWidth>& vector, MapValues<ApplyGate, kWidth>& own,
                                        const MapCache<ApplyGate>& cache, const VectorPlace& place) const {
    const Vector<Real, kWidth> column_gates = vector_at<kWidth>(cache.field(0), place.column_at);
    const Real row_gate = cache.field(0)[place.row_at];
    if constexpr (kSavesIndex) update_argmax<1>(vector, own, cache, place);
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      vector.at[i] = narrow<T>(widen_at(vector, i) * (own.field[0].at[i] + column_gates.at[i] + row_gate));
  }

  template <int kAxis>
  __device__ __forceinline__ void flush(int64_t sample, int64_t outer, int64_t inner, int32_t found) const {
    const GateMap<Real>& map = maps.axis[kAxis];
    if (map.branch < 0) return;
    int32_t* at = &index[map.offset(sample, outer, inner)];
    if (!shares_index[kAxis]) {
      *at = found;
    } else if (found != kNoIndex) {
      atomicMin(at, found);
    }
  }
};

template <typename T>
struct ApplyGateBackward {
  using Element = T;
  using Real = Arithmetic<T>;
  static constexpr int kFields = 3;  // gate / branches, the gradient through the mean, the gradient of the maximum
  static constexpr int kBlocksPerSm = 2;
  static constexpr bool kReads = true, kWrites = true, kHasIndex = true, kFindsIndex = false;

  const T* in;
  T* out;
  GateMaps<Real> maps;
  const Real* grad_pooled;
  const int32_t* index;

  template <int kAxis>
  __device__ __forceinline__ GateFunction<Real> prepare() const {
    return maps.template gate_function<kAxis>();
  }
  template <int kAxis, typename Set>
  __device__ __forceinline__ void load(const GateFunction<Real>& function, int64_t sample, int64_t outer, int64_t inner,
                                       Set set, int32_t& position) const {
    const GateMap<Real>& map = maps.axis[kAxis];
    const bool exists = map.branch >= 0;
    const int64_t at = map.offset(sample, outer, inner), at_maximum = map.offset_of_two(sample, outer, inner);
    set(0, exists ? maps.branch_weight * function.gate(maps.response[at]) : Real(0));
    set(1, exists ? grad_pooled[at_maximum + map.numel] : Real(0));
    set(2, exists ? grad_pooled[at_maximum] : Real(0));
    position = exists ? index[at] : -1;
  }

  template <int kWidth>
  __device__ __forceinline__ void apply(Vector<T, kWidth>& vector, const MapValues<ApplyGateBackward, kWidth>& own,
                                        const MapCache<ApplyGateBackward>& cache, const VectorPlace& place) const {
    const auto column_gates = vector_at<kWidth>(cache.field(0), place.column_at);
    const auto column_means = vector_at<kWidth>(cache.field(1), place.column_at);
    const auto column_maxima = vector_at<kWidth>(cache.field(2), place.column_at);
    const auto column_index = vector_at<kWidth>(cache.index(), place.column_at);
    const Real row_gate = cache.field(0)[place.row_at];
    const Real row_mean = cache.field(1)[place.row_at];
    const Real row_maximum = cache.field(2)[place.row_at];
    const auto row_index = cache.index()[place.row_at] - static_cast<int32_t>(place.column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      Real gradient = widen_at(vector, i) * (own.field[0].at[i] + column_gates.at[i] + row_gate);
      gradient += own.field[1].at[i] + column_means.at[i] + row_mean;
      if (own.index.at[i] == static_cast<int32_t>(place.slice)) gradient += own.field[2].at[i];
      if (column_index.at[i] == static_cast<int32_t>(place.row)) gradient += column_maxima.at[i];
      if (row_index == i) gradient += row_maximum;
      vector.at[i] = narrow<T>(gradient);
    }
  }
};

}  // namespace

template <typename Real>
void launch_apply_gate(const void* x, void* y, const GateMaps<Real>& maps, const Real* pooled, int32_t* index,
                       Dtype dtype, const Geometry& geometry, const PassPlan& plan, cudaStream_t stream) {
  with_element<Real>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const auto* in = static_cast<const T*>(x);
    auto* out = static_cast<T*>(y);
    if (index) {
      const ApplyGate<T, true> apply{in, out, maps, pooled, index, {true, plan.splits(1), plan.splits(2)}};
      launch_apply(apply, geometry, plan, stream);
    } else {
      launch_apply(ApplyGate<T, false>{in, out, maps, nullptr, nullptr, {}}, geometry, plan, stream);
    }
  });
}

template <typename Real>
void launch_apply_gate_backward(const void* grad_y, void* grad_x, const GateMaps<Real>& maps, const Real* grad_pooled,
                                const int32_t* index, Dtype dtype, const Geometry& geometry, const PassPlan& plan,
                                cudaStream_t stream) {
  with_element<Real>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const ApplyGateBackward<T> apply{static_cast<const T*>(grad_y), static_cast<T*>(grad_x), maps, grad_pooled, index};
    launch_apply(apply, geometry, plan, stream);
  });
}

template void launch_apply_gate(const void*, void*, const GateMaps<float>&, const float*, int32_t*, Dtype,
                                const Geometry&, const PassPlan&, cudaStream_t);
template void launch_apply_gate(const void*, void*, const GateMaps<double>&, const double*, int32_t*, Dtype,
                                const Geometry&, const PassPlan&, cudaStream_t);
template void launch_apply_gate_backward(const void*, void*, const GateMaps<float>&, const float*, const int32_t*,
                                         Dtype, const Geometry&, const PassPlan&, cudaStream_t);
template void launch_apply_gate_backward(const void*, void*, const GateMaps<double>&, const double*, const int32_t*,
                                         Dtype, const Geometry&, const PassPlan&, cudaStream_t);

}  // namespace hashengine::triplet
