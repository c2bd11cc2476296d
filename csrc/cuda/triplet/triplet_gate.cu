// triplet_gate on the GPU: y = x * (mean of the sigmoids of the two or three maps).
//
// Forward: the apply pass (apply.cuh). Backward: the apply pass computes dx from dy in the same way as y from x. The
// reduce pass of triplet_attention (reduce.cu) sums x * dy along each axis, and a kernel over the maps multiplies the
// sums by the slopes of the sigmoids.
//
// Traffic, for N elements of s bytes. Forward: Ns read and Ns written, the floor. Backward: 3Ns read and Ns written.
// The floor, 2Ns read and Ns written, needs a single pass, but the reduce pass has no registers left to compute dx,
// too. Maps: see apply.cuh.
//
// Launch. As in apply.cuh and reduce.cu. The kernel over the maps has 128 threads per block and 8 values per thread.
//
// Numerics. Arithmetic in float32 (float64 for float64), rounded once.

#include "cuda/triplet/apply.cuh"
#include "cuda/triplet/passes.h"
#include "hashengine/triplet_gate.h"

namespace hashengine {
namespace {

using namespace triplet;

// An Apply functor (apply.cuh): multiplies the elements by the mean of the sigmoids of the maps.
template <typename T>
struct ApplySigmoids {
  using Element = T;
  using Real = Arithmetic<T>;
  static constexpr int kFields = 1;  // the gate, divided by the number of branches
  static constexpr int kBlocksPerSm = 3;
  static constexpr bool kReads = true, kWrites = true, kHasIndex = false, kFindsIndex = false;

  const T* in;
  T* out;
  MapViews<const Real> maps;
  Real branch_weight;  // 1 / number of branches

  template <int kAxis>
  __device__ __forceinline__ MapView<const Real> prepare() const {
    return maps.axis[kAxis];
  }
  template <int kAxis, typename Set>
  __device__ __forceinline__ void load(const MapView<const Real>& map, int64_t sample, int64_t outer, int64_t inner,
                                       Set set, int32_t&) const {
    set(0, map.data ? branch_weight * sigmoid(*map.at(sample, outer, inner)) : Real(0));
  }
  template <int kWidth>
  __device__ __forceinline__ void apply(Vector<T, kWidth>& vector, const MapValues<ApplySigmoids, kWidth>& own,
                                        const MapCache<ApplySigmoids>& cache, const VectorPlace& place) const {
    const Vector<Real, kWidth> column_gates = vector_at<kWidth>(cache.field(0), place.column_at);
    const Real row_gate = cache.field(0)[place.row_at];
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      vector.at[i] = narrow<T>(widen(vector.at[i]) * (own.field[0].at[i] + column_gates.at[i] + row_gate));
  }
};

template <typename Real>
Real weight_of_branch(const TripletShape& shape) {
  return Real(1) / static_cast<Real>(shape.branches);
}

// Computes out = in * (mean of the sigmoids of the maps).
void launch_apply_sigmoids(const void* in, void* out, const void* const (&maps)[kTripletBranches],
                           const TripletShape& shape, cudaStream_t stream) {
  const Geometry geometry = Geometry::from_shape(shape);
  const int width = vector_width(geometry, shape.dtype, in, out);
  with_floating_type(shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using Real = Arithmetic<T>;
    const ApplySigmoids<T> apply{static_cast<const T*>(in), static_cast<T*>(out),
                                 MapViews<const Real>::make(geometry, maps, 1), weight_of_branch<Real>(shape)};
    launch_apply(apply, geometry, PassPlan::for_apply(geometry, width), stream);
  });
}

template <typename Real>
struct MapGradients {
  BranchMaps<Real> maps;  // the sums of x * dy, in parts
  BranchPointers<const Real> map;
  BranchPointers<Real> grad_map;
};

// Merges the parts of the sums, and multiplies the sums by the slopes of the sigmoids.
template <typename Real>
__global__ void __launch_bounds__(MapTiling::kThreads) map_gradients_kernel(MapGradients<Real> params) {
  const MapTile<Real> tile(params.maps);
  const BranchMap<Real>& map = tile.map;
  const Real* values = params.map[tile.branch] + tile.sample * map.numel();
  Real* gradients = params.grad_map[tile.branch] + tile.sample * map.numel();
#pragma unroll 1  // eight copies of the loop over the parts would not fit in the registers
  for (int r = 0; r < MapTiling::kRows; ++r) {
    if (!tile.has(r)) break;
    const Real* source = map.source_at(tile.sample, tile.value_row(r), tile.column + tile.thread_column);
    Real grad_gate = *source;
    for (int part = 1; part < map.source.parts; ++part) grad_gate += source[part * map.source.part_stride];
    const Real gate = sigmoid(values[tile.offset(r)]);
    gradients[tile.offset(r)] = grad_gate * gate * (Real(1) - gate);
  }
}

// What the computation of the gradients of the maps needs: the plan of the reduce pass, and scratch for the sums of
// x * dy.
template <typename Real>
struct MapBackward {
  Geometry geometry;
  PassPlan plan;
  AxisMaps<Real> products;

  MapBackward(const TripletShape& shape, int width, Workspace& workspace)
      : geometry(Geometry::from_shape(shape)),
        plan(PassPlan::for_reduce<Real>(geometry, width)),
        products(partial_maps<Real>(geometry, plan.tiling, 1, workspace)) {
    for (AxisMap<Real>& map : products.axis) map.scale = weight_of_branch<Real>(shape);
  }

  void launch_all(const TripletGateBackward& params, cudaStream_t stream) const {
    launch_reduce_products(params.x, params.grad_y, params.shape.dtype, geometry, plan, products, stream);
    const MapGradients<Real> gradients{BranchMaps<Real>::without_parameters(geometry, params.shape, products),
                                       BranchPointers<const Real>::make(params.map),
                                       BranchPointers<Real>::make(params.grad_map)};
    launch(map_gradients_kernel<Real>, gradients.maps.blocks(), MapTiling::kThreads, stream, gradients);
  }
};

}  // namespace

int64_t triplet_gate_backward_workspace_bytes(const TripletShape& shape) {
  return with_real(shape.dtype, [&](auto real) {
    return workspace_bytes(
        shape, [&](int width, Workspace& workspace) { MapBackward<decltype(real)>(shape, width, workspace); });
  });
}

void launch_triplet_gate_forward(const TripletGateForward& params, cudaStream_t stream) {
  launch_apply_sigmoids(params.x, params.y, params.map, params.shape, stream);
}

void launch_triplet_gate_backward(const TripletGateBackward& params, void* workspace, cudaStream_t stream) {
  with_real(params.shape.dtype, [&](auto real) {
    Workspace arrays(workspace);
    const Geometry geometry = Geometry::from_shape(params.shape);
    const int width = vector_width(geometry, params.shape.dtype, params.x, params.grad_y);
    MapBackward<decltype(real)>(params.shape, width, arrays).launch_all(params, stream);
  });
  launch_apply_sigmoids(params.grad_y, params.grad_x, params.map, params.shape, stream);
}

}  // namespace hashengine
