// The reduce pass: one pass over x that reduces it along each of its axes A0, A1 and A2. The results along an axis are
// "the map" of that axis. triplet_attention and triplet_pool need the maximum and the sum of x; the gradients of the
// gates need the sum of x * dy. tiles.cuh defines the axes, tile, slice, position and slot.
//
// Idea. A thread keeps the reduction along A0 of its positions in registers. Each slice is also staged in shared
// memory, where other threads reduce it over its rows (A1) and over its columns (A2). Device memory is therefore read
// once, and only the last steps of the reduction over columns use shuffles. If a tile does not span an axis, the map of
// that axis is left in parts. The kernel that reads the map merges the parts in their order.
//
// Traffic, for N elements of s bytes. Reads Ns (2Ns with dy), the floor. Writes one partial map per axis and part: for
// a tile of 56 x 56 x 56 elements, 3 * 56^2 values of two Reals each (one with dy). The next kernel finds them in L2.
//
// Instructions. Each of the three reductions processes each element once: with a conversion (half precision only), a
// maximum (one instruction per element for float32, one per two elements for half precision) and an addition. Together
// with loads, staging and the last steps, that is about 9 instructions per element for bfloat16 and 8 for float32.
// Estimate: in the time that an H200 loads one element, it issues 12 for bfloat16 and 24 for float32.
//
// Launch. 256 threads per block, one tile of x per block (tiles.cuh). Each thread has four 16-byte vectors in flight:
// 16 KB per block. The registers allow two blocks per multiprocessor, with 32 KB in flight. (The 4.8 TB/s of an H200 at
// an assumed latency of 0.8 microseconds need 29 KB.) A block has 32 KB of slices and at most 12 KB of scratch in
// shared memory, and two barriers per stage, that is, per filling of the 32 KB.
//
// Numerics. Sums in float32 (float64 for float64). A thread sums at most as many elements as the tile has along the
// axis. Sums over lanes, groups, slots and parts follow (see below). The order depends on the shape, on the dtype, on
// the alignment of the arrays and on the device's number of multiprocessors, but not on timing. A NaN makes the maxima
// and sums of its lines NaN.
//
// Limits. At most 2^31 - 1 tiles; each axis shorter than 2^31.

#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/common/maximum.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/triplet/accumulator.cuh"
#include "cuda/triplet/passes.h"

namespace hashengine::triplet {
namespace {

// A Source has these members: Element (the type that is loaded), Value (the type that is reduced; its sums have the
// type Arithmetic<Value>), kHasMaximum, load<kWidth>(offset), whose result can wait in registers while other loads are
// issued, and values<kWidth>(loaded).

template <typename T>
struct PoolSource {
  using Element = T;
  using Value = T;
  static constexpr bool kHasMaximum = true;
  const T* x;

  template <int kWidth>
  __device__ __forceinline__ Words<T, kWidth> load(int64_t offset) const {
    return words_at<kWidth>(x, offset);
  }
  template <int kWidth>
  static __device__ __forceinline__ Vector<T, kWidth> values(const Words<T, kWidth>& loaded) {
    return as_vector<T, kWidth>(loaded);
  }
};

template <typename T>
struct ProductSource {
  using Element = T;
  using Value = Arithmetic<T>;
  static constexpr bool kHasMaximum = false;
  const T* x;
  const T* grad_y;

  template <int kWidth>
  struct Loaded {
    Words<T, kWidth> x, grad_y;
  };

  template <int kWidth>
  __device__ __forceinline__ Loaded<kWidth> load(int64_t offset) const {
    return {words_at<kWidth>(x, offset), words_at<kWidth>(grad_y, offset)};
  }
  template <int kWidth>
  static __device__ __forceinline__ Vector<Value, kWidth> values(const Loaded<kWidth>& loaded) {
    const auto factors = as_vector<T, kWidth>(loaded.x), gradients = as_vector<T, kWidth>(loaded.grad_y);
    Vector<Value, kWidth> products;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) products.at[i] = widen_at(factors, i) * widen_at(gradients, i);
    return products;
  }
};

template <typename Source, int kWidth>
struct ReduceConfig {
  using Value = typename Source::Value;
  using Real = Arithmetic<Value>;
  static constexpr int kVectors = reduce_vectors(kWidth);  // vectors of a slice per thread
  // The number of slices that are loaded before the first is used. There are no registers for more.
  static constexpr int kBatch = kWidth == 1 || kWidth * sizeof(typename Source::Element) == kVectorBytes ? 2 : 4;
  static constexpr int kPositions = kPassThreads * kVectors * kWidth;
  static constexpr int kStageValues = (32 << 10) / sizeof(Value);
  static constexpr int kScratchValues = kPassThreads * kWidth;
  static_assert(kPositions <= kStageValues);

  struct alignas(16) Shared {
    Value stage[kStageValues];
    Real sum[kScratchValues];
    Value maximum[Source::kHasMaximum ? kScratchValues : 1];
  };
};

template <typename Source, int kWidth>
using Running = Accumulator<typename Source::Value, kWidth, Source::kHasMaximum>;

// The maximum and the sum of a line of elements along one axis. The maximum is not used if kHasMaximum is false.
template <typename Source>
struct Reduced {
  using Real = Arithmetic<typename Source::Value>;
  Real largest = -Real(INFINITY);
  Real sum = 0;

  __device__ __forceinline__ void add(Real other_largest, Real other_sum) {
    sum += other_sum;
    if constexpr (Source::kHasMaximum) largest = maximum(largest, other_largest);
  }
};

// The slices that are staged in shared memory: [slices][rows][columns].
template <typename Source, int kWidth>
struct Stage {
  using Config = ReduceConfig<Source, kWidth>;
  static constexpr int kVectors = Config::kVectors;
  typename Config::Shared& shared;
  int slices;
  int rows;
  int columns;

  __device__ __forceinline__ Vector<typename Source::Value, kWidth> vector(int slice, int row, int index) const {
    return vector_at<kWidth>(shared.stage, (slice * rows + row) * columns + index * kWidth);
  }

  // The number of groups that divide the rows of a slice among them: group g reduces the rows g, g + groups, ...
  __device__ __forceinline__ int groups(int max_slices) const {
    const int wanted = kPassThreads / (max_slices * (columns / kWidth));
    return wanted < 1 ? 1 : (wanted < rows ? wanted : rows);
  }

  // The first half of the reduction over the rows: a thread reduces the rows of one group, for a vector of kWidth
  // columns. With one group it calls emit(slice, column, reduced); with several groups it stores the result in scratch.
  template <typename Emit>
  __device__ __forceinline__ void reduce_rows(int group_count, Emit emit) {
    const int vectors = columns / kWidth;
    for (int item = threadIdx.x; item < slices * group_count * vectors; item += kPassThreads) {
      const int group = item / vectors % group_count;
      const int slice = item / (vectors * group_count);
      Running<Source, kWidth> running;
      for (int row = group; row < rows; row += group_count) running.add(vector(slice, row, item % vectors));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (group_count == 1) {
          emit(slice, item % vectors * kWidth + i, reduced_at(running, i));
        } else {
          shared.sum[item * kWidth + i] = running.sum[i];
          if constexpr (Source::kHasMaximum) shared.maximum[item * kWidth + i] = running.largest.at(i);
        }
      }
    }
  }

  // The second half, after a barrier: merges the results of the groups, in the order of the groups.
  template <typename Emit>
  __device__ __forceinline__ void merge_groups(int group_count, Emit emit) {
    if (group_count == 1) return;
    for (int item = threadIdx.x; item < slices * columns; item += kPassThreads) {
      const int slice = item / columns, column = item % columns;
      emit(slice, column, merge_scratch(slice * group_count * columns + column, group_count, columns));
    }
  }

  __device__ __forceinline__ Reduced<Source> merge_scratch(int begin, int count, int stride) const {
    Reduced<Source> reduced;
    for (int i = 0; i < count; ++i) {
      const int at = begin + i * stride;
      reduced.add(Source::kHasMaximum ? widen(shared.maximum[at]) : 0, shared.sum[at]);
    }
    return reduced;
  }

  // Reduces over the columns and calls emit(slice, row, reduced). Several lanes of a warp share a row if there are too
  // few rows to keep the block busy.
  template <typename Emit>
  __device__ __forceinline__ void reduce_columns(Emit emit) {
    const int vectors = columns / kWidth;
    int lanes = 1;
    while (lanes < kWarpThreads && 2 * lanes <= vectors && slices * rows * lanes < 4 * kPassThreads) lanes *= 2;
    const int items = slices * rows * lanes;
    const int lane = threadIdx.x % kWarpThreads;
    for (int warp_item = threadIdx.x - lane; warp_item < items; warp_item += kPassThreads) {
      const int item = warp_item + lane;
      const int line = item / lanes;
      Running<Source, kWidth> running;
      if (item < items)
        for (int v = item % lanes; v < vectors; v += lanes) running.add(vector(0, line, v));
      Reduced<Source> reduced;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) merge(reduced, reduced_at(running, i));
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        const auto sum = __shfl_xor_sync(kWholeWarp, reduced.sum, distance);
        const auto largest = Source::kHasMaximum ? __shfl_xor_sync(kWholeWarp, reduced.largest, distance) : 0;
        reduced.add(largest, sum);
      }
      if (item < items && item % lanes == 0) emit(line / rows, line % rows, reduced);
    }
  }

  static __device__ __forceinline__ void merge(Reduced<Source>& into, const Reduced<Source>& other) {
    into.add(other.largest, other.sum);
  }
  static __device__ __forceinline__ Reduced<Source> reduced_at(const Running<Source, kWidth>& running, int i) {
    Reduced<Source> reduced;
    reduced.sum = running.sum[i];
    if constexpr (Source::kHasMaximum) reduced.largest = widen(running.largest.at(i));
    return reduced;
  }
};

// Loads the slices, one per slot at a time. Adds them to the reductions of the thread's positions, and stages them.
template <typename Source, int kWidth>
__device__ __forceinline__ void stage_slices(const Source& source, const Stage<Source, kWidth>& stage,
                                             const ThreadPositions<kWidth>& positions, int64_t first_offset,
                                             int64_t slice_numel, int64_t row_numel,
                                             Running<Source, kWidth> (&running)[Stage<Source, kWidth>::kVectors]) {
  using Config = ReduceConfig<Source, kWidth>;
  for (int first = positions.slot; first < stage.slices; first += Config::kBatch * positions.slots) {
    decltype(source.template load<kWidth>(0)) loaded[Config::kBatch][Config::kVectors];
#pragma unroll
    for (int b = 0; b < Config::kBatch; ++b) {
#pragma unroll
      for (int k = 0; k < Config::kVectors; ++k) {
        const int slice = first + b * positions.slots;
        if (slice < stage.slices && positions.has(k))
          loaded[b][k] = source.template load<kWidth>(first_offset + slice * slice_numel +
                                                      positions.row(k) * row_numel + positions.column(k));
      }
    }
#pragma unroll
    for (int b = 0; b < Config::kBatch; ++b) {
#pragma unroll
      for (int k = 0; k < Config::kVectors; ++k) {
        const int slice = first + b * positions.slots;
        if (slice >= stage.slices || !positions.has(k)) continue;
        const auto values = Source::template values<kWidth>(loaded[b][k]);
        running[k].add(values);
        vector_at<kWidth>(stage.shared.stage, slice * stage.rows * stage.columns + positions.vector(k) * kWidth) =
            values;
      }
    }
  }
}

// Calls emit(row, column, reduced) with the reduction over A0 of each position, after the last slice. If there are
// several slots, their results are merged through scratch.
template <typename Source, int kWidth, typename Emit>
__device__ __forceinline__ void emit_positions(
    Stage<Source, kWidth>& stage, const ThreadPositions<kWidth>& positions,
    const Running<Source, kWidth> (&running)[Stage<Source, kWidth>::kVectors], Emit emit) {
  if (positions.slots == 1) {
#pragma unroll
    for (int k = 0; k < ReduceConfig<Source, kWidth>::kVectors; ++k) {
      if (!positions.has(k)) break;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) emit(positions.row(k), positions.column(k) + i, stage.reduced_at(running[k], i));
    }
    return;
  }
  const int slice_values = positions.slice_vectors * kWidth;
  if (positions.slot < positions.slots) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int at = positions.slot * slice_values + positions.first * kWidth + i;
      stage.shared.sum[at] = running[0].sum[i];
      if constexpr (Source::kHasMaximum) stage.shared.maximum[at] = running[0].largest.at(i);
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < slice_values; at += kPassThreads)
    emit(at / stage.columns, at % stage.columns, stage.merge_scratch(at, positions.slots, slice_values));
}

template <typename Source, int kWidth>
__global__ void __launch_bounds__(kPassThreads, 2)
    reduce_kernel(Source source, Geometry geometry, Tiling tiling, AxisMaps<Arithmetic<typename Source::Value>> maps) {
  using Config = ReduceConfig<Source, kWidth>;
  auto& shared = *dynamic_shared<typename Config::Shared>();
  const Tile tile = Tile::of_block(geometry, tiling);
  const ThreadPositions<kWidth> positions(tile);
  Stage<Source, kWidth> stage{shared, 0, tile.size[1], tile.size[2]};
  const int max_slices = min(Config::kStageValues / (stage.rows * stage.columns), tile.size[0]);
  const int groups = stage.groups(max_slices);
  Running<Source, kWidth> running[Config::kVectors];

  for (int first = 0; first < tile.size[0]; first += max_slices) {
    stage.slices = min(max_slices, tile.size[0] - first);
    stage_slices(source, stage, positions, tile.slice_begin(geometry, first), geometry.size[1] * geometry.size[2],
                 geometry.size[2], running);
    __syncthreads();
    const auto to_map_1 = [&](int slice, int column, const Reduced<Source>& reduced) {
      maps.template store<Source::kHasMaximum>(1, tile, first + slice, column, reduced.largest, reduced.sum);
    };
    if (maps.has(1)) stage.reduce_rows(groups, to_map_1);
    if (maps.has(2))
      stage.reduce_columns([&](int slice, int row, const Reduced<Source>& reduced) {
        maps.template store<Source::kHasMaximum>(2, tile, first + slice, row, reduced.largest, reduced.sum);
      });
    __syncthreads();  // the stage can be overwritten, and all groups are in scratch
    if (maps.has(1)) stage.merge_groups(groups, to_map_1);
  }
  __syncthreads();  // scratch can be overwritten
  if (maps.has(0))
    emit_positions(stage, positions, running, [&](int row, int column, const Reduced<Source>& reduced) {
      maps.template store<Source::kHasMaximum>(0, tile, row, column, reduced.largest, reduced.sum);
    });
}

template <typename Source, typename Real>
void launch_reduce(const Source& source, const Geometry& geometry, const PassPlan& plan, const AxisMaps<Real>& maps,
                   cudaStream_t stream) {
  with_vector_width<typename Source::Element>(plan.width, [&](auto width) {
    using Config = ReduceConfig<Source, decltype(width)::value>;
    launch(reduce_kernel<Source, decltype(width)::value>,
           {plan.tiling.blocks(geometry.samples), kPassThreads, sizeof(typename Config::Shared)}, stream, source,
           geometry, plan.tiling, maps);
  });
}

}  // namespace

template <typename Real>
void launch_reduce_pool(const void* x, Dtype dtype, const Geometry& geometry, const PassPlan& plan,
                        const AxisMaps<Real>& maps, cudaStream_t stream) {
  with_element<Real>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_reduce(PoolSource<T>{static_cast<const T*>(x)}, geometry, plan, maps, stream);
  });
}

template <typename Real>
void launch_reduce_products(const void* x, const void* grad_y, Dtype dtype, const Geometry& geometry,
                            const PassPlan& plan, const AxisMaps<Real>& maps, cudaStream_t stream) {
  with_element<Real>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_reduce(ProductSource<T>{static_cast<const T*>(x), static_cast<const T*>(grad_y)}, geometry, plan, maps,
                  stream);
  });
}

template void launch_reduce_pool(const void*, Dtype, const Geometry&, const PassPlan&, const AxisMaps<float>&,
                                 cudaStream_t);
template void launch_reduce_pool(const void*, Dtype, const Geometry&, const PassPlan&, const AxisMaps<double>&,
                                 cudaStream_t);
template void launch_reduce_products(const void*, const void*, Dtype, const Geometry&, const PassPlan&,
                                     const AxisMaps<float>&, cudaStream_t);
template void launch_reduce_products(const void*, const void*, Dtype, const Geometry&, const PassPlan&,
                                     const AxisMaps<double>&, cudaStream_t);

}  // namespace hashengine::triplet
