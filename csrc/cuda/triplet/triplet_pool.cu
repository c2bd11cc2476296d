// triplet_pool on the GPU, for all three branches.
//
// Forward: the reduce pass of triplet_attention (reduce.cu) reads x, a kernel over the maps merges their parts, and a
// second pass over x finds the indices of the maxima (argmax.cuh). Backward: one apply pass (apply.cuh) writes dx from
// the maps alone.
//
// Traffic, for N elements of s bytes. Forward: 2Ns read. The floor is Ns, but the reduce pass has too few instructions
// to spare to find the indices (reduce.cu). If x is not much larger than L2, the second pass finds a part of it there.
// Backward: Ns written, the floor. Maps: see apply.cuh.
//
// Launch. As in reduce.cu and apply.cuh. The kernel over the maps has 128 threads per block and 8 values per thread.
//
// Numerics. Sums in float32 (float64 for float64); maxima are exact.

#include "cuda/triplet/apply.cuh"
#include "cuda/triplet/argmax.cuh"
#include "cuda/triplet/passes.h"
#include "hashengine/triplet_pool.h"

namespace hashengine {
namespace {

using namespace triplet;

template <typename Real>
struct PoolMerge {
  BranchMaps<Real> maps;  // the pooled maps, in parts
  BranchPointers<Real> pool;
  BranchPointers<int32_t> index;
};

// Merges the parts. Also initializes the indices, because FindArgmax stores them by atomicMin.
template <typename Real>
__global__ void __launch_bounds__(MapTiling::kThreads) merge_kernel(PoolMerge<Real> params) {
  const MapTile<Real> tile(params.maps);
  const BranchMap<Real>& map = tile.map;
  const int64_t begin = tile.sample * map.numel();
  Real* pool = params.pool[tile.branch] + 2 * begin;
  int32_t* index = params.index[tile.branch] + begin;
#pragma unroll
  for (int r = 0; r < MapTiling::kRows; ++r) {
    if (!tile.has(r)) break;
    const Real* source = map.source_at(tile.sample, tile.value_row(r), tile.column + tile.thread_column);
    Real largest = source[0], mean = source[map.source.channel_stride];
    for (int part = 1; part < map.source.parts; ++part) {
      source += map.source.part_stride;
      largest = maximum(largest, source[0]);
      mean += source[map.source.channel_stride];
    }
    pool[tile.offset(r)] = largest;
    pool[map.numel() + tile.offset(r)] = mean;
    index[tile.offset(r)] = kNoIndex;
  }
}

// An Apply functor (apply.cuh) that writes no element: it finds the indices of the maxima.
template <typename T>
struct FindArgmax {
  using Element = T;
  using Real = Arithmetic<T>;
  static constexpr int kFields = 1;  // the maximum
  static constexpr int kBlocksPerSm = 2;
  static constexpr bool kReads = true, kWrites = false, kHasIndex = true, kFindsIndex = true;

  const T* in;
  MapViews<const Real> pool;
  MapViews<int32_t> index;

  template <int kAxis>
  __device__ __forceinline__ MapView<const Real> prepare() const {
    return pool.axis[kAxis];
  }
  template <int kAxis, typename Set>
  __device__ __forceinline__ void load(const MapView<const Real>& map, int64_t sample, int64_t outer, int64_t inner,
                                       Set set, int32_t& found) const {
    set(0, *map.at(sample, outer, inner));
    found = kNoIndex;
  }
  template <int kWidth>
  __device__ __forceinline__ void apply(Vector<T, kWidth>& vector, MapValues<FindArgmax, kWidth>& own,
                                        const MapCache<FindArgmax>& cache, const VectorPlace& place) const {
    update_argmax<0>(vector, own, cache, place);
  }
  template <int kAxis>
  __device__ __forceinline__ void flush(int64_t sample, int64_t outer, int64_t inner, int32_t found) const {
    if (found != kNoIndex) atomicMin(index.axis[kAxis].at(sample, outer, inner), found);
  }
};

// An Apply functor (apply.cuh) that reads no element: it computes dx from the indices and the gradients of the pooled
// maps.
template <typename T>
struct PoolBackward {
  using Element = T;
  using Real = Arithmetic<T>;
  static constexpr int kFields = 2;  // the gradient through the mean, the gradient of the maximum
  static constexpr int kBlocksPerSm = 2;
  static constexpr bool kReads = false, kWrites = true, kHasIndex = true, kFindsIndex = false;

  T* out;
  MapViews<const Real> grad_pool;
  MapViews<const int32_t> index;
  int64_t size[3];  // the sizes of the axes A0, A1, A2 of x (tiles.cuh)

  template <int kAxis>
  __device__ __forceinline__ MapView<const Real> prepare() const {
    return grad_pool.axis[kAxis];
  }
  template <int kAxis, typename Set>
  __device__ __forceinline__ void load(const MapView<const Real>& map, int64_t sample, int64_t outer, int64_t inner,
                                       Set set, int32_t& position) const {
    const Real* gradient = map.at(sample, outer, inner);
    set(0, gradient[map.sample_stride / 2] / static_cast<Real>(size[kAxis]));
    set(1, *gradient);
    position = *index.axis[kAxis].at(sample, outer, inner);
  }
  template <int kWidth>
  __device__ __forceinline__ void apply(Vector<T, kWidth>& vector, const MapValues<PoolBackward, kWidth>& own,
                                        const MapCache<PoolBackward>& cache, const VectorPlace& place) const {
    const auto column_means = vector_at<kWidth>(cache.field(0), place.column_at);
    const auto column_maxima = vector_at<kWidth>(cache.field(1), place.column_at);
    const auto column_index = vector_at<kWidth>(cache.index(), place.column_at);
    const Real row_mean = cache.field(0)[place.row_at], row_maximum = cache.field(1)[place.row_at];
    const auto row_index = cache.index()[place.row_at] - static_cast<int32_t>(place.column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      Real gradient = own.field[0].at[i] + column_means.at[i] + row_mean;
      if (own.index.at[i] == static_cast<int32_t>(place.slice)) gradient += own.field[1].at[i];
      if (column_index.at[i] == static_cast<int32_t>(place.row)) gradient += column_maxima.at[i];
      if (row_index == i) gradient += row_maximum;
      vector.at[i] = narrow<T>(gradient);
    }
  }
};

// The plan and the arrays of a forward.
template <typename Real>
struct PoolForward {
  Geometry geometry;
  PassPlan reduce_plan;
  PassPlan argmax_plan;
  AxisMaps<Real> parts;

  PoolForward(const TripletShape& shape, int width, Workspace& workspace)
      : geometry(Geometry::from_shape(shape)),
        reduce_plan(PassPlan::for_reduce<Real>(geometry, width)),
        argmax_plan(PassPlan::for_apply(geometry, width)),
        parts(partial_maps<Real>(geometry, reduce_plan.tiling, 2, workspace)) {
    for (int a = 0; a < 3; ++a) parts.axis[a].scale = Real(1) / static_cast<Real>(geometry.size[a]);
  }

  void launch_all(const TripletPoolForward& params, cudaStream_t stream) const {
    launch_reduce_pool(params.x, params.shape.dtype, geometry, reduce_plan, parts, stream);
    const PoolMerge<Real> merge{BranchMaps<Real>::without_parameters(geometry, params.shape, parts),
                                BranchPointers<Real>::make(params.pool), BranchPointers<int32_t>::make(params.index)};
    launch(merge_kernel<Real>, merge.maps.blocks(), MapTiling::kThreads, stream, merge);
    with_element<Real>(params.shape.dtype, [&](auto tag) {
      using T = typename decltype(tag)::Type;
      const FindArgmax<T> argmax{static_cast<const T*>(params.x), MapViews<const Real>::make(geometry, params.pool, 2),
                                 MapViews<int32_t>::make(geometry, params.index, 1)};
      launch_apply(argmax, geometry, argmax_plan, stream);
    });
  }
};

}  // namespace

int64_t triplet_pool_forward_workspace_bytes(const TripletShape& shape) {
  return with_real(shape.dtype, [&](auto real) {
    return workspace_bytes(
        shape, [&](int width, Workspace& workspace) { PoolForward<decltype(real)>(shape, width, workspace); });
  });
}

void launch_triplet_pool_forward(const TripletPoolForward& params, void* workspace, cudaStream_t stream) {
  with_real(params.shape.dtype, [&](auto real) {
    Workspace arrays(workspace);
    const int width = vector_width(Geometry::from_shape(params.shape), params.shape.dtype, params.x, params.x);
    PoolForward<decltype(real)>(params.shape, width, arrays).launch_all(params, stream);
  });
}

void launch_triplet_pool_backward(const TripletPoolBackward& params, cudaStream_t stream) {
  const Geometry geometry = Geometry::from_shape(params.shape);
  const int width = vector_width(geometry, params.shape.dtype, params.grad_x, params.grad_x);
  with_floating_type(params.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const PoolBackward<T> backward{static_cast<T*>(params.grad_x),
                                   MapViews<const Arithmetic<T>>::make(geometry, params.grad_pool, 2),
                                   MapViews<const int32_t>::make(geometry, params.index, 1),
                                   {geometry.size[0], geometry.size[1], geometry.size[2]}};
    launch_apply(backward, geometry, PassPlan::for_apply(geometry, width), stream);
  });
}

}  // namespace hashengine
