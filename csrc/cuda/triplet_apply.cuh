// The pass that applies the maps to the elements: y from x and the gates, dx from dy, the gates and the pools'
// gradients.
//
// Idea. What an element needs of the A0 map stays in its thread's registers while the thread walks along A0; what it
// needs of the A1 and A2 maps is worked out once a line (a sigmoid, say) and kept in shared memory for a run of slices.
//
// Traffic, N elements of s bytes. Reads Ns and writes Ns, the floor; each map once, and again for each tile that does
// not span its axis.
//
// Launch. 256 threads, a brick of x a block (triplet_tiles.cuh); two vectors of 16 bytes a thread are in flight, 16 KB
// in the two blocks that a multiprocessor holds at least (half of the traffic is reads: 2.4 TB/s at 0.8 microseconds
// need 15 KB). Up to 36 KB of map values in shared memory; two barriers a run of slices.
//
// Limits. As triplet_reduce.cuh.
#pragma once

#include "triplet_kernels.h"

namespace hashengine {

// What is kept of kWidth map values side by side: Apply::kFields Reals and an index each. See TripletGate in
// triplet_gate.cu for what an Apply has.
template <typename Apply, int kWidth>
struct MapValues {
  Vector<typename Apply::Real, kWidth> field[Apply::kFields];
  Vector<int32_t, kWidth> index;
};

// Map values in shared memory: for a run of slices those of the A1 map, [slices][columns], and then of the A2 map,
// [slices][rows]; before and after, those of the positions on their way to and from registers. Each field has kValues,
// and the indices come last.
template <typename Apply>
struct MapRun {
  using Real = typename Apply::Real;
  static constexpr int kValues = 8192 / sizeof(Real);  // enough for a slice of the largest tile
  static constexpr int64_t kBytes = kValues * static_cast<int64_t>(Apply::kFields * sizeof(Real) + sizeof(int32_t));
  const Apply& apply;
  const Brick& brick;
  int rows;
  int columns;
  int full;  // the most slices

  __device__ __forceinline__ MapRun(const Apply& apply, const Brick& brick)
      : apply(apply), brick(brick), rows(brick.extent[1]), columns(brick.extent[2]) {
    full = min(kValues / (rows + columns), brick.extent[0]);
  }
  __device__ __forceinline__ Real* field(int f) const { return dynamic_shared<Real>() + f * kValues; }
  __device__ __forceinline__ int32_t* index() const { return reinterpret_cast<int32_t*>(field(Apply::kFields)); }
  __device__ __forceinline__ int row_at(int slice, int row) const { return full * columns + slice * rows + row; }
  __device__ __forceinline__ int column_at(int slice, int column) const { return slice * columns + column; }

  // The values of `lines` lines of an axis' map, [lines][width], from a line and a column of the map on.
  template <int kAxis>
  __device__ __forceinline__ void load(int first_at, int lines, int width, int64_t line, int64_t column) const {
    const auto prepared = apply.template prepare<kAxis>();
    for (int i = threadIdx.x; i < lines * width; i += kTripletThreads) {
      const int at = first_at + i;
      apply.template load<kAxis>(
          prepared, brick.sample, line + i / width, column + i % width,
          [&](int f, Real value) { field(f)[at] = value; }, index()[at]);
    }
  }
  template <int kAxis>
  __device__ __forceinline__ void flush(int first_at, int lines, int width, int64_t line, int64_t column) const {
    for (int i = threadIdx.x; i < lines * width; i += kTripletThreads)
      apply.template flush<kAxis>(brick.sample, line + i / width, column + i % width, index()[first_at + i]);
  }
  __device__ __forceinline__ void load_lines(int64_t slice, int slices) const {
    load<1>(0, slices, columns, slice, brick.begin[2]);
    load<2>(full * columns, slices, rows, slice, brick.begin[1]);
  }
  __device__ __forceinline__ void flush_lines(int64_t slice, int slices) const {
    flush<1>(0, slices, columns, slice, brick.begin[2]);
    flush<2>(full * columns, slices, rows, slice, brick.begin[1]);
  }
};

// The values of the A0 map at the thread's positions.
template <typename Apply, int kWidth, int kVectors>
__device__ __forceinline__ void load_positions(const MapRun<Apply>& run, const ThreadTile<kWidth>& mine,
                                               MapValues<Apply, kWidth> (&kept)[kVectors]) {
  const auto prepared = run.apply.template prepare<0>();
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int first = k * kTripletThreads * kWidth;
    const int count = min(mine.vectors * kWidth - first, kTripletThreads * kWidth);
    for (int i = threadIdx.x; i < count; i += kTripletThreads)
      run.apply.template load<0>(
          prepared, run.brick.sample, run.brick.begin[1] + (first + i) / run.columns,
          run.brick.begin[2] + (first + i) % run.columns,
          [&](int f, typename Apply::Real value) { run.field(f)[i] = value; }, run.index()[i]);
    __syncthreads();
    if (mine.has(k)) {
#pragma unroll
      for (int f = 0; f < Apply::kFields; ++f) kept[k].field[f] = vector_at<kWidth>(run.field(f), mine.first * kWidth);
      if constexpr (Apply::kHasIndex) kept[k].index = vector_at<kWidth>(run.index(), mine.first * kWidth);
    }
    __syncthreads();
  }
}

// The indices that were found for the thread's positions.
template <typename Apply, int kWidth, int kVectors>
__device__ __forceinline__ void flush_positions(const MapRun<Apply>& run, const ThreadTile<kWidth>& mine,
                                                const MapValues<Apply, kWidth> (&kept)[kVectors]) {
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int first = k * kTripletThreads * kWidth, tile_values = mine.vectors * kWidth;
    const int count = mine.slots > 1 ? mine.slots * tile_values : min(tile_values - first, kTripletThreads * kWidth);
    __syncthreads();
    if (mine.has(k)) vector_at<kWidth>(run.index(), static_cast<int>(threadIdx.x) * kWidth) = kept[k].index;
    __syncthreads();
    if (mine.slots > 1 && k > 0) return;
    for (int i = threadIdx.x; i < count; i += kTripletThreads) {
      const int position = mine.slots > 1 ? i % tile_values : first + i;
      run.apply.template flush<0>(run.brick.sample, run.brick.begin[1] + position / run.columns,
                                  run.brick.begin[2] + position % run.columns, run.index()[i]);
    }
  }
}

// Where a vector lies in x (its first element), and its map values in the run.
struct VectorPlace {
  int64_t slice;
  int64_t row;
  int64_t column;
  int column_at;
  int row_at;
};

template <int kWidth>
struct ApplyConfig {
  static constexpr int kVectors = triplet_apply_vectors(kWidth);
  static constexpr int kBatch = 2;  // slices that are loaded before the first is used
};

template <typename Apply, int kWidth>
__global__ void __launch_bounds__(kTripletThreads, Apply::kBlocks)
    triplet_apply_kernel(Apply apply, TripletGeometry geometry, TripletTiling tiling) {
  constexpr int kVectors = ApplyConfig<kWidth>::kVectors;
  constexpr int kBatch = ApplyConfig<kWidth>::kBatch;
  const Brick brick = Brick::of_block(geometry, tiling);
  const ThreadTile<kWidth> mine(brick);
  const MapRun<Apply> run(apply, brick);
  const int64_t slice_numel = geometry.size[1] * geometry.size[2];
  MapValues<Apply, kWidth> kept[kVectors];
  load_positions(run, mine, kept);

  for (int first = 0; first < brick.extent[0]; first += run.full) {
    const int slices = min(run.full, brick.extent[0] - first);
    run.load_lines(brick.begin[0] + first, slices);
    __syncthreads();
    const int64_t begin = brick.slice_begin(geometry, first);
    for (int batch = mine.slot; batch < slices; batch += kBatch * mine.slots) {
      Vector<typename Apply::Element, kWidth> values[kBatch][kVectors];
      const auto each_vector = [&](auto function) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
          for (int k = 0; k < kVectors; ++k) {
            const int slice = batch + b * mine.slots;
            if (slice < slices && mine.has(k))
              function(values[b][k], slice, k,
                       begin + slice * slice_numel + mine.row(k) * geometry.size[2] + mine.column(k));
          }
        }
      };
      if constexpr (Apply::kReads)
        each_vector([&](auto& vector, int, int, int64_t offset) { vector = vector_at<kWidth>(apply.in, offset); });
      each_vector([&](auto& vector, int slice, int k, int64_t offset) {
        const VectorPlace place{brick.begin[0] + first + slice, brick.begin[1] + mine.row(k),
                                brick.begin[2] + mine.column(k), run.column_at(slice, mine.column(k)),
                                run.row_at(slice, mine.row(k))};
        apply.apply(vector, kept[k], run, place);
        if constexpr (Apply::kWrites) vector_at<kWidth>(apply.out, offset) = vector;
      });
    }
    __syncthreads();
    if constexpr (Apply::kFindsIndex) run.flush_lines(brick.begin[0] + first, slices);
  }
  if constexpr (Apply::kFindsIndex) flush_positions(run, mine, kept);
}

template <typename Apply>
void launch_triplet_apply(const Apply& apply, const TripletGeometry& geometry, const TripletCut& cut,
                          cudaStream_t stream) {
  with_vector_width<typename Apply::Element>(cut.width, [&](auto width) {
    launch(triplet_apply_kernel<Apply, decltype(width)::value>,
           {cut.tiling.blocks(geometry.samples), kTripletThreads, MapRun<Apply>::kBytes}, stream, apply, geometry,
           cut.tiling);
  });
}

}  // namespace hashengine
