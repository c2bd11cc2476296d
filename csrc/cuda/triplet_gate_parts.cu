// triplet_gate on the GPU: y = x times the mean of its two or three maps' sigmoids. Backward: dx = dy times the same;
// the products of dy and x are added up over each axis by triplet attention's own pass, and a kernel over the maps
// multiplies the sums by the sigmoids' slopes.
//
// Traffic, N elements of s bytes. Forward Ns read and Ns written, the floor. Backward 3Ns read and Ns written, where
// 2Ns and Ns are the floor: the pass that adds up has no registers left for the gates. Maps: see triplet_apply.cuh.
//
// Launch. As triplet_apply.cuh and triplet_reduce.cuh; the kernel over the maps has 128 threads with 8 values each.
//
// Numerics. Arithmetic in float32 (float64 for float64), rounded once.

#include "hashengine/triplet_gate.h"
#include "triplet_apply.cuh"
#include "triplet_parts.cuh"

namespace hashengine {
namespace {

// An Apply as TripletGate in triplet_gate.cu is, without convolution, BatchNorm and indices.
template <typename T>
struct PlainGate {
  using Element = T;
  using Real = Arithmetic<T>;
  static constexpr int kFields = 1;  // the gate
  static constexpr int kBlocks = 3;
  static constexpr bool kReads = true, kWrites = true, kHasIndex = false, kFindsIndex = false;

  const T* in;
  T* out;
  MapViews<const Real> maps;
  Real share;  // of a branch in the mean gate

  template <int kAxis>
  __device__ __forceinline__ MapView<const Real> prepare() const {
    return maps.axis[kAxis];
  }
  template <int kAxis, typename Set>
  __device__ __forceinline__ void load(const MapView<const Real>& map, int64_t sample, int64_t outer, int64_t inner,
                                       Set set, int32_t&) const {
    set(0, map.data ? share * sigmoid(*map.at(sample, outer, inner)) : Real(0));
  }
  template <int kWidth>
  __device__ __forceinline__ void apply(Vector<T, kWidth>& vector, const MapValues<PlainGate, kWidth>& kept,
                                        const MapRun<PlainGate>& run, const VectorPlace& place) const {
    const auto gates = vector_at<kWidth>(run.field(0), place.column_at);
    const Real row_gate = run.field(0)[place.row_at];
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      vector.at[i] = narrow<T>(widen(vector.at[i]) * (kept.field[0].at[i] + gates.at[i] + row_gate));
  }
};

template <typename Real>
Real share_of_branch(const TripletShape& shape) {
  return Real(1) / static_cast<Real>(shape.branches);
}

// out = in times the mean gate.
void launch_plain_gate(const void* in, void* out, const void* const (&maps)[kTripletBranches],
                       const TripletShape& shape, cudaStream_t stream) {
  const TripletGeometry geometry = TripletGeometry::of(shape);
  const int width = vector_width(geometry, shape.dtype, in, out);
  with_floating_type(shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using Real = Arithmetic<T>;
    const PlainGate<T> gate{static_cast<const T*>(in), static_cast<T*>(out),
                            MapViews<const Real>::of(geometry, maps, 1), share_of_branch<Real>(shape)};
    launch_triplet_apply(gate, geometry, TripletCut::to_apply(geometry, width), stream);
  });
}

template <typename Real>
struct GateSlopes {
  BranchMaps<Real> maps;  // the sums of dy x, in parts
  BranchPointers<const Real> map;
  BranchPointers<Real> grad_map;
};

// Adds the parts up and multiplies by the sigmoid's slope.
template <typename Real>
__global__ void __launch_bounds__(MapTiling::kThreads) slopes_kernel(GateSlopes<Real> params) {
  const MapTile<Real> tile(params.maps);
  const BranchMap<Real>& map = tile.map;
  const Real* values = params.map[tile.branch] + tile.sample * map.numel();
  Real* gradients = params.grad_map[tile.branch] + tile.sample * map.numel();
#pragma unroll 1  // eight copies of the loop over the parts would not fit the registers
  for (int r = 0; r < MapTiling::kRows; ++r) {
    if (!tile.has(r)) break;
    const Real* source = map.source_at(tile.sample, tile.value_row(r), tile.column + tile.thread_column);
    Real grad_gate = *source;
    for (int part = 1; part < map.source.parts; ++part) grad_gate += source[part * map.source.part_stride];
    const Real gate = sigmoid(values[tile.offset(r)]);
    gradients[tile.offset(r)] = grad_gate * gate * (Real(1) - gate);
  }
}

// What the maps' gradients take, with its scratch from the arena.
template <typename Real>
struct GateGradients {
  TripletGeometry geometry;
  TripletCut cut;
  AxisMaps<Real> products;

  GateGradients(const TripletShape& shape, int width, Arena& arena)
      : geometry(TripletGeometry::of(shape)),
        cut(TripletCut::to_reduce(geometry, width)),
        products(partial_maps<Real>(geometry, cut.tiling, 1, arena)) {
    for (AxisMap<Real>& map : products.axis) map.scale = share_of_branch<Real>(shape);
  }

  void launch_all(const TripletGateBackward& params, cudaStream_t stream) const {
    launch_triplet_products(params.x, params.grad_y, params.shape.dtype, geometry, cut, products, stream);
    const GateSlopes<Real> slopes{plain_maps(geometry, params.shape, products),
                                  BranchPointers<const Real>::of(params.map),
                                  BranchPointers<Real>::of(params.grad_map)};
    launch(slopes_kernel<Real>, slopes.maps.blocks(), MapTiling::kThreads, stream, slopes);
  }
};

}  // namespace

int64_t triplet_gate_backward_workspace_bytes(const TripletShape& shape) {
  return with_real(shape.dtype, [&](auto real) {
    return most_bytes(shape, [&](int width, Arena& arena) { GateGradients<decltype(real)>(shape, width, arena); });
  });
}

void launch_triplet_gate_forward(const TripletGateForward& params, cudaStream_t stream) {
  launch_plain_gate(params.x, params.y, params.map, params.shape, stream);
}

void launch_triplet_gate_backward(const TripletGateBackward& params, void* workspace, cudaStream_t stream) {
  with_real(params.shape.dtype, [&](auto real) {
    Arena arena(workspace);
    const int width = vector_width(TripletGeometry::of(params.shape), params.shape.dtype, params.x, params.grad_y);
    GateGradients<decltype(real)>(params.shape, width, arena).launch_all(params, stream);
  });
  launch_plain_gate(params.grad_y, params.grad_x, params.map, params.shape, stream);
}

}  // namespace hashengine
