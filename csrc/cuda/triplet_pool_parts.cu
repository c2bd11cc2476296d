// triplet_pool on the GPU, all three branches. Forward: the pooling pass of triplet attention reads x, a kernel over
// the maps adds their parts up, and a second pass over x finds where the maxima lie. Backward: one pass writes dx from
// the maps alone.
//
// Traffic, N elements of s bytes. Forward 2Ns read, where Ns is the floor: an index carried through the first pass
// would cost more instructions than it has to spare (triplet_reduce.cuh), and x of a layer's size is still in L2 in
// part. Backward Ns written, the floor. Maps: see triplet_apply.cuh.
//
// Launch. As triplet_reduce.cuh and triplet_apply.cuh; the kernel over the maps has 128 threads with 8 values each.
//
// Numerics. Sums in float32 (float64 for float64); a maximum is exact.

#include "hashengine/triplet_pool.h"
#include "triplet_maxima.cuh"
#include "triplet_parts.cuh"

namespace hashengine {
namespace {

template <typename Real>
struct PoolMerge {
  BranchMaps<Real> maps;  // the parts
  BranchPointers<Real> pool;
  BranchPointers<int32_t> index;
};

// Adds up what the blocks of the pooling pass found, and prepares the indices for the least to be found.
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
    index[tile.offset(r)] = kNoMaximum;
  }
}

// An Apply as TripletGate in triplet_gate.cu is, which writes no element.
template <typename T>
struct FindMaxima {
  using Element = T;
  using Real = Arithmetic<T>;
  static constexpr int kFields = 1;  // the maximum
  static constexpr int kBlocks = 2;
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
    found = kNoMaximum;
  }
  template <int kWidth>
  __device__ __forceinline__ void apply(Vector<T, kWidth>& vector, MapValues<FindMaxima, kWidth>& kept,
                                        const MapRun<FindMaxima>& run, const VectorPlace& place) const {
    note_maxima<0>(vector, kept, run, place);
  }
  template <int kAxis>
  __device__ __forceinline__ void flush(int64_t sample, int64_t outer, int64_t inner, int32_t found) const {
    if (found != kNoMaximum) atomicMin(index.axis[kAxis].at(sample, outer, inner), found);
  }
};

// An Apply that reads no element: dx from the pools' gradients and the indices.
template <typename T>
struct PoolBackward {
  using Element = T;
  using Real = Arithmetic<T>;
  static constexpr int kFields = 2;  // the gradients through the mean and to the maximum
  static constexpr int kBlocks = 2;
  static constexpr bool kReads = false, kWrites = true, kHasIndex = true, kFindsIndex = false;

  T* out;
  MapViews<const Real> grad_pool;
  MapViews<const int32_t> index;
  int64_t size[3];  // of the pooled axes

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
  __device__ __forceinline__ void apply(Vector<T, kWidth>& vector, const MapValues<PoolBackward, kWidth>& kept,
                                        const MapRun<PoolBackward>& run, const VectorPlace& place) const {
    const auto means = vector_at<kWidth>(run.field(0), place.column_at);
    const auto maxima = vector_at<kWidth>(run.field(1), place.column_at);
    const auto rows = vector_at<kWidth>(run.index(), place.column_at);
    const Real row_mean = run.field(0)[place.row_at], row_maximum = run.field(1)[place.row_at];
    const auto row_index = run.index()[place.row_at] - static_cast<int32_t>(place.column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      Real gradient = kept.field[0].at[i] + means.at[i] + row_mean;
      if (kept.index.at[i] == static_cast<int32_t>(place.slice)) gradient += kept.field[1].at[i];
      if (rows.at[i] == static_cast<int32_t>(place.row)) gradient += maxima.at[i];
      if (row_index == i) gradient += row_maximum;
      vector.at[i] = narrow<T>(gradient);
    }
  }
};

// Everything that a forward launches, with its scratch from the arena.
template <typename Real>
struct PoolForward {
  TripletGeometry geometry;
  TripletCut reduce_cut;
  TripletCut find_cut;
  AxisMaps<Real> parts;

  PoolForward(const TripletShape& shape, int width, Arena& arena)
      : geometry(TripletGeometry::of(shape)),
        reduce_cut(TripletCut::to_reduce(geometry, width)),
        find_cut(TripletCut::to_apply(geometry, width)),
        parts(partial_maps<Real>(geometry, reduce_cut.tiling, 2, arena)) {
    for (int a = 0; a < 3; ++a) parts.axis[a].scale = Real(1) / static_cast<Real>(geometry.size[a]);
  }

  void launch_all(const TripletPoolForward& params, cudaStream_t stream) const {
    launch_triplet_pool(params.x, params.shape.dtype, geometry, reduce_cut, parts, stream);
    const PoolMerge<Real> merge{plain_maps(geometry, params.shape, parts), BranchPointers<Real>::of(params.pool),
                                BranchPointers<int32_t>::of(params.index)};
    launch(merge_kernel<Real>, merge.maps.blocks(), MapTiling::kThreads, stream, merge);
    with_element<Real>(params.shape.dtype, [&](auto tag) {
      using T = typename decltype(tag)::Type;
      const FindMaxima<T> find{static_cast<const T*>(params.x), MapViews<const Real>::of(geometry, params.pool, 2),
                               MapViews<int32_t>::of(geometry, params.index, 1)};
      launch_triplet_apply(find, geometry, find_cut, stream);
    });
  }
};

}  // namespace

int64_t triplet_pool_forward_workspace_bytes(const TripletShape& shape) {
  return with_real(shape.dtype, [&](auto real) {
    return most_bytes(shape, [&](int width, Arena& arena) { PoolForward<decltype(real)>(shape, width, arena); });
  });
}

void launch_triplet_pool_forward(const TripletPoolForward& params, void* workspace, cudaStream_t stream) {
  with_real(params.shape.dtype, [&](auto real) {
    Arena arena(workspace);
    const int width = vector_width(TripletGeometry::of(params.shape), params.shape.dtype, params.x, params.x);
    PoolForward<decltype(real)>(params.shape, width, arena).launch_all(params, stream);
  });
}

void launch_triplet_pool_backward(const TripletPoolBackward& params, cudaStream_t stream) {
  const TripletGeometry geometry = TripletGeometry::of(params.shape);
  const int width = vector_width(geometry, params.shape.dtype, params.grad_x, params.grad_x);
  with_floating_type(params.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const PoolBackward<T> backward{static_cast<T*>(params.grad_x),
                                   MapViews<const Arithmetic<T>>::of(geometry, params.grad_pool, 2),
                                   MapViews<const int32_t>::of(geometry, params.index, 1),
                                   {geometry.size[0], geometry.size[1], geometry.size[2]}};
    launch_triplet_apply(backward, geometry, TripletCut::to_apply(geometry, width), stream);
  });
}

}  // namespace hashengine
