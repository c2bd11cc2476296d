// The reduction over A0, over A1 and over A2 in one pass: maximum and sum of x for the pooling, the sum of dy x for the
// gates' gradients.
//
// Idea. A thread keeps the A0 reduction of its positions in registers. Each slice is also staged in shared memory,
// where other threads reduce it over rows (A1) and over columns (A2). So device memory is read once, and nothing is
// exchanged through shuffles but the ends of rows. Where a tile does not span an axis, that axis' map stays partial;
// the kernel that reads the maps adds the parts up in their order.
//
// Traffic, N elements of s bytes. Reads Ns (2Ns with dy), the floor. Writes a partial map an axis and part: for a tile
// of 56 x 56, 56 slices deep, 3/56 of two Reals an element, which the next kernel finds in L2.
//
// Instructions. Each of the three reductions takes an element once: a conversion (half precision only), half a maximum
// (two at a time; one for float32) and an addition; with loads, stages and row ends about 9 for bfloat16, 8 for
// float32. An H200 issues 12 in the time that it loads a bfloat16, 24 for a float32.
//
// Launch. 256 threads, a brick of x a block (triplet_tiles.cuh). Four 16-byte vectors a thread are in flight, 16 KB a
// block, 32 KB in the two blocks that the registers leave room for (4.8 TB/s at 0.8 microseconds need 29 KB). 32 KB of
// slices and at most 12 KB of scratch in shared memory; two barriers a stage.
//
// Numerics. Sums in float32 (float64 for float64): at most extent / group in a chain, then over groups, slots and
// parts, all in orders that the shape alone fixes. A NaN makes its maxima and sums NaN.
//
// Limits. At most 2^31 - 1 bricks; each axis below 2^31.
#pragma once

#include <type_traits>

#include "launch.cuh"
#include "maximum.cuh"
#include "reduce.cuh"
#include "triplet_kernels.h"
#include "triplet_maps.cuh"
#include "triplet_tiles.cuh"

namespace hashengine {

// A Source has an Element (what is loaded), a Value (what is reduced, whose sums are Arithmetic<Value>), kHasMaximum,
// and load<kWidth>(offset). See triplet_pool.cu and triplet_products.cu.

template <typename Source, int kWidth>
struct ReduceConfig {
  using Value = typename Source::Value;
  using Real = Arithmetic<Value>;
  // Vectors of a slice a thread, and slices that are loaded before the first is used.
  static constexpr int kVectors = triplet_reduce_vectors(kWidth);
  static constexpr int kBatch = kWidth * sizeof(typename Source::Element) == kVectorBytes ? 2 : 4;
  static constexpr int kPositions = kTripletThreads * kVectors * kWidth;
  static constexpr int kStageValues = (32 << 10) / sizeof(Value);
  static constexpr int kScratchValues = kTripletThreads * kWidth;
  static_assert(kPositions <= kStageValues);

  struct alignas(16) Shared {
    Value stage[kStageValues];
    Real sum[kScratchValues];
    Value maximum[Source::kHasMaximum ? kScratchValues : 1];
  };
};

// The maximum and the sum so far of kWidth lines side by side.
template <typename Source, int kWidth>
struct Running {
  using Value = typename Source::Value;
  using Real = Arithmetic<Value>;
  Vector<Value, kWidth> largest;
  Real sum[kWidth];

  __device__ __forceinline__ Running() {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum[i] = 0;
      if constexpr (Source::kHasMaximum) largest.at[i] = narrow<Value>(-Real(INFINITY));
    }
  }
  __device__ __forceinline__ void add(const Vector<Value, kWidth>& values) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] += widen(values.at[i]);
    if constexpr (Source::kHasMaximum) largest = maximum(largest, values);
  }
};

// A maximum and a sum of one line; the maximum stays unused where the source has none.
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

// The slices that are staged in shared memory, [slices][rows][columns].
template <typename Source, int kWidth>
struct Stage {
  using Config = ReduceConfig<Source, kWidth>;
  static constexpr int kVectors = Config::kVectors;
  typename Config::Shared& shared;
  int slices;
  int rows;
  int columns;

  __device__ __forceinline__ Vector<typename Source::Value, kWidth> vector(int slice, int row, int vector) const {
    return vector_at<kWidth>(shared.stage, (slice * rows + row) * columns + vector * kWidth);
  }

  // Rows of a slice are shared by this many threads a column vector, each taking every groups-th.
  __device__ __forceinline__ int groups(int full_slices) const {
    const int wanted = kTripletThreads / (full_slices * (columns / kWidth));
    return wanted < 1 ? 1 : (wanted < rows ? wanted : rows);
  }

  // Over the rows, first half: to emit(slice, column, reduced) where one thread has a whole column, else to scratch.
  template <typename Emit>
  __device__ __forceinline__ void reduce_rows(int groups, Emit emit) {
    const int vectors = columns / kWidth;
    for (int item = threadIdx.x; item < slices * groups * vectors; item += kTripletThreads) {
      const int group = item / vectors % groups;
      const int slice = item / (vectors * groups);
      Running<Source, kWidth> running;
      for (int row = group; row < rows; row += groups) running.add(vector(slice, row, item % vectors));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (groups == 1) {
          emit(slice, item % vectors * kWidth + i, reduced_at(running, i));
        } else {
          shared.sum[item * kWidth + i] = running.sum[i];
          if constexpr (Source::kHasMaximum) shared.maximum[item * kWidth + i] = running.largest.at[i];
        }
      }
    }
  }

  // The second half, after a barrier: the groups in their order.
  template <typename Emit>
  __device__ __forceinline__ void merge_groups(int groups, Emit emit) {
    if (groups == 1) return;
    for (int item = threadIdx.x; item < slices * columns; item += kTripletThreads) {
      const int slice = item / columns, column = item % columns;
      emit(slice, column, merge_scratch(slice * groups * columns + column, groups, columns));
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

  // Over the columns. Lanes of a warp share a row, as many as keep the block busy.
  template <typename Emit>
  __device__ __forceinline__ void reduce_columns(Emit emit) {
    const int vectors = columns / kWidth;
    int lanes = 1;
    while (lanes < kWarpThreads && 2 * lanes <= vectors && slices * rows * lanes < 4 * kTripletThreads) lanes *= 2;
    const int items = slices * rows * lanes;
    const int lane = threadIdx.x % kWarpThreads;
    for (int warp_item = threadIdx.x - lane; warp_item < items; warp_item += kTripletThreads) {
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
    if constexpr (Source::kHasMaximum) reduced.largest = widen(running.largest.at[i]);
    return reduced;
  }
};

// Loads slices slots by slots: into the registers of their positions and into the stage.
template <typename Source, int kWidth>
__device__ __forceinline__ void stage_slices(const Source& source, const Stage<Source, kWidth>& stage,
                                             const ThreadTile<kWidth>& mine, int64_t first_offset, int64_t slice_numel,
                                             int64_t row_numel,
                                             Running<Source, kWidth> (&running)[Stage<Source, kWidth>::kVectors]) {
  using Config = ReduceConfig<Source, kWidth>;
  for (int first = mine.slot; first < stage.slices; first += Config::kBatch * mine.slots) {
    Vector<typename Source::Value, kWidth> loaded[Config::kBatch][Config::kVectors];
#pragma unroll
    for (int b = 0; b < Config::kBatch; ++b) {
#pragma unroll
      for (int k = 0; k < Config::kVectors; ++k) {
        const int slice = first + b * mine.slots;
        if (slice < stage.slices && mine.has(k))
          loaded[b][k] = source.template load<kWidth>(first_offset + slice * slice_numel + mine.row(k) * row_numel +
                                                      mine.column(k));
      }
    }
#pragma unroll
    for (int b = 0; b < Config::kBatch; ++b) {
#pragma unroll
      for (int k = 0; k < Config::kVectors; ++k) {
        const int slice = first + b * mine.slots;
        if (slice >= stage.slices || !mine.has(k)) continue;
        running[k].add(loaded[b][k]);
        vector_at<kWidth>(stage.shared.stage, slice * stage.rows * stage.columns + mine.vector(k) * kWidth) =
            loaded[b][k];
      }
    }
  }
}

// After the last slice: each position's reduction over A0, through scratch where slots have to be merged.
template <typename Source, int kWidth, typename Emit>
__device__ __forceinline__ void emit_positions(
    Stage<Source, kWidth>& stage, const ThreadTile<kWidth>& mine,
    const Running<Source, kWidth> (&running)[Stage<Source, kWidth>::kVectors], Emit emit) {
  if (mine.slots == 1) {
#pragma unroll
    for (int k = 0; k < ReduceConfig<Source, kWidth>::kVectors; ++k) {
      if (!mine.has(k)) break;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) emit(mine.row(k), mine.column(k) + i, stage.reduced_at(running[k], i));
    }
    return;
  }
  const int tile_values = mine.vectors * kWidth;
  if (mine.slot < mine.slots) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int at = mine.slot * tile_values + mine.first * kWidth + i;
      stage.shared.sum[at] = running[0].sum[i];
      if constexpr (Source::kHasMaximum) stage.shared.maximum[at] = running[0].largest.at[i];
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < tile_values; at += kTripletThreads)
    emit(at / stage.columns, at % stage.columns, stage.merge_scratch(at, mine.slots, tile_values));
}

template <typename Source, int kWidth>
__global__ void __launch_bounds__(kTripletThreads, 2)
    triplet_reduce_kernel(Source source, TripletGeometry geometry, TripletTiling tiling,
                          AxisMaps<Arithmetic<typename Source::Value>> maps) {
  using Config = ReduceConfig<Source, kWidth>;
  auto& shared = *dynamic_shared<typename Config::Shared>();
  const Brick brick = Brick::of_block(geometry, tiling);
  const ThreadTile<kWidth> mine(brick);
  Stage<Source, kWidth> stage{shared, 0, brick.extent[1], brick.extent[2]};
  const int full = min(Config::kStageValues / (stage.rows * stage.columns), brick.extent[0]);
  const int groups = stage.groups(full);
  Running<Source, kWidth> running[Config::kVectors];

  for (int first = 0; first < brick.extent[0]; first += full) {
    stage.slices = min(full, brick.extent[0] - first);
    stage_slices(source, stage, mine, brick.slice_begin(geometry, first), geometry.size[1] * geometry.size[2],
                 geometry.size[2], running);
    __syncthreads();
    const auto to_map_1 = [&](int slice, int column, const Reduced<Source>& reduced) {
      maps.template store<Source::kHasMaximum>(1, brick, first + slice, column, reduced.largest, reduced.sum);
    };
    if (maps.has(1)) stage.reduce_rows(groups, to_map_1);
    if (maps.has(2))
      stage.reduce_columns([&](int slice, int row, const Reduced<Source>& reduced) {
        maps.template store<Source::kHasMaximum>(2, brick, first + slice, row, reduced.largest, reduced.sum);
      });
    __syncthreads();  // the stage is free, and the groups' columns are in scratch
    if (maps.has(1)) stage.merge_groups(groups, to_map_1);
  }
  __syncthreads();  // scratch is free
  if (maps.has(0))
    emit_positions(stage, mine, running, [&](int row, int column, const Reduced<Source>& reduced) {
      maps.template store<Source::kHasMaximum>(0, brick, row, column, reduced.largest, reduced.sum);
    });
}

template <typename Source, typename Real>
void launch_triplet_reduce(const Source& source, const TripletGeometry& geometry, const TripletCut& cut,
                           const AxisMaps<Real>& maps, cudaStream_t stream) {
  with_vector_width<typename Source::Element>(cut.width, [&](auto width) {
    using Config = ReduceConfig<Source, decltype(width)::value>;
    launch(triplet_reduce_kernel<Source, decltype(width)::value>,
           {cut.tiling.blocks(geometry.samples), kTripletThreads, sizeof(typename Config::Shared)}, stream, source,
           geometry, cut.tiling, maps);
  });
}

}  // namespace hashengine
