// The apply pass: one pass over the elements. It combines each element with the values of the maps at its position. For
// example, triplet_attention computes y from x and the gates, and dx from dy, the gates and the gradients of the pooled
// maps.
//
// Idea. x is an array [samples][A0][A1][A2] (tiles.cuh), and "the A0 map" is the map of the branch that pools A0. A
// thread has the same A1 and A2 positions in every slice, so their values of the A0 map stay in its registers while it
// moves along A0. Each value of the A1 and A2 maps is computed once per tile (a sigmoid, for example). These values are
// cached in shared memory for a run of slices: as many consecutive slices as the cache has room for.
//
// Traffic, for N elements of s bytes. Reads Ns and writes Ns, the floor. In triplet_pool, the forward only reads and
// the backward only writes. The map of an axis is read once for each tile along this axis.
//
// Launch. 256 threads per block, one tile of x per block (tiles.cuh). Each thread has two 16-byte vectors in flight. A
// multiprocessor runs at least two blocks and therefore has at least 16 KB in flight. (Half of the 4.8 TB/s of an H200
// is reads; 2.4 TB/s at an assumed latency of 0.8 microseconds need 15 KB per multiprocessor.) A block has up to 32 KB
// of map values in shared memory, and two barriers per run of slices.
//
// Limits. As in reduce.cu.
//
// The pass is a template over an Apply functor, which has these members:
//   Element, Real              type of the elements, type of the map values
//   in, out                    the elements to read, if kReads; the elements to write, if kWrites
//   kFields                    number of Reals that are cached per map value
//   kBlocksPerSm               blocks per multiprocessor that the registers must allow
//   kReads, kWrites            whether the pass reads elements, whether it writes elements
//   kHasIndex                  whether an index is cached per map value
//   kFindsIndex                whether apply() updates the cached indices; flush() then stores them
//   prepare<kAxis>()           returns the data that load<kAxis>() needs for every value of the axis's map
//   load<kAxis>(prepared, sample, outer, inner, set, index)
//                              calls set(field, value) for each field of a map value and initializes its cached index
//   apply(vector, own, cache, place)
//                              replaces the elements of `vector` by the results; `own` has the values of the A0 map
//   flush<kAxis>(sample, outer, inner, index)
//                              stores the index that apply() found for a map value
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/triplet/maps.cuh"

namespace hashengine::triplet {

// kWidth adjacent values of the A0 map, in registers.
template <typename Apply, int kWidth>
struct MapValues {
  Vector<typename Apply::Real, kWidth> field[Apply::kFields];
  Vector<int32_t, kWidth> index;
};

// Map values in shared memory. During a run of slices it holds the values of the A1 map, [slices][columns], then those
// of the A2 map, [slices][rows]. Before the first run it passes the values of the A0 map to the threads' registers.
// After the last run it passes the indices of the A0 map's maxima from the registers to the result. Each field has room
// for kValues values. The indices follow the last field.
template <typename Apply>
struct MapCache {
  using Real = typename Apply::Real;
  static constexpr int kValues = 8192 / sizeof(Real);  // enough for the map values of one slice of the largest tile
  static constexpr int64_t kBytes = kValues * static_cast<int64_t>(Apply::kFields * sizeof(Real) + sizeof(int32_t));
  const Apply& apply;
  const Tile& tile;
  int rows;
  int columns;
  int max_slices;  // per run

  __device__ __forceinline__ MapCache(const Apply& pass_apply, const Tile& block_tile)
      : apply(pass_apply), tile(block_tile), rows(tile.size[1]), columns(tile.size[2]) {
    max_slices = min(kValues / (rows + columns), tile.size[0]);
  }
  __device__ __forceinline__ Real* field(int f) const { return dynamic_shared<Real>() + f * kValues; }
  __device__ __forceinline__ int32_t* index() const { return reinterpret_cast<int32_t*>(field(Apply::kFields)); }
  __device__ __forceinline__ int row_at(int slice, int row) const { return max_slices * columns + slice * rows + row; }
  __device__ __forceinline__ int column_at(int slice, int column) const { return slice * columns + column; }

  // Loads [lines][width] values of the map of kAxis. They begin at outer index `line` and inner index `column`, and
  // take the places of the cache from first_at on.
  template <int kAxis>
  __device__ __forceinline__ void load(int first_at, int lines, int width, int64_t line, int64_t column) const {
    const auto prepared = apply.template prepare<kAxis>();
    for (int i = threadIdx.x; i < lines * width; i += kPassThreads) {
      const int at = first_at + i;
      apply.template load<kAxis>(
          prepared, tile.sample, line + i / width, column + i % width, [&](int f, Real value) { field(f)[at] = value; },
          index()[at]);
    }
  }
  // Stores the indices that are cached in these places.
  template <int kAxis>
  __device__ __forceinline__ void flush(int first_at, int lines, int width, int64_t line, int64_t column) const {
    for (int i = threadIdx.x; i < lines * width; i += kPassThreads)
      apply.template flush<kAxis>(tile.sample, line + i / width, column + i % width, index()[first_at + i]);
  }
  __device__ __forceinline__ void load_lines(int64_t slice, int slices) const {
    load<1>(0, slices, columns, slice, tile.begin[2]);
    load<2>(max_slices * columns, slices, rows, slice, tile.begin[1]);
  }
  __device__ __forceinline__ void flush_lines(int64_t slice, int slices) const {
    flush<1>(0, slices, columns, slice, tile.begin[2]);
    flush<2>(max_slices * columns, slices, rows, slice, tile.begin[1]);
  }
};

// Loads the values of the A0 map at the thread's positions.
template <typename Apply, int kWidth, int kVectors>
__device__ __forceinline__ void load_positions(const MapCache<Apply>& cache, const ThreadPositions<kWidth>& positions,
                                               MapValues<Apply, kWidth> (&own)[kVectors]) {
  const auto prepared = cache.apply.template prepare<0>();
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int first = k * kPassThreads * kWidth;
    const int count = min(positions.slice_vectors * kWidth - first, kPassThreads * kWidth);
    for (int i = threadIdx.x; i < count; i += kPassThreads)
      cache.apply.template load<0>(
          prepared, cache.tile.sample, cache.tile.begin[1] + (first + i) / cache.columns,
          cache.tile.begin[2] + (first + i) % cache.columns,
          [&](int f, typename Apply::Real value) { cache.field(f)[i] = value; }, cache.index()[i]);
    __syncthreads();
    if (positions.has(k)) {
#pragma unroll
      for (int f = 0; f < Apply::kFields; ++f)
        own[k].field[f] = vector_at<kWidth>(cache.field(f), positions.first * kWidth);
      if constexpr (Apply::kHasIndex) own[k].index = vector_at<kWidth>(cache.index(), positions.first * kWidth);
    }
    __syncthreads();
  }
}

// Stores the indices that the thread found for the maxima of the A0 map at its positions.
template <typename Apply, int kWidth, int kVectors>
__device__ __forceinline__ void flush_positions(const MapCache<Apply>& cache, const ThreadPositions<kWidth>& positions,
                                                const MapValues<Apply, kWidth> (&own)[kVectors]) {
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int first = k * kPassThreads * kWidth, slice_values = positions.slice_vectors * kWidth;
    const int count =
        positions.slots > 1 ? positions.slots * slice_values : min(slice_values - first, kPassThreads * kWidth);
    __syncthreads();
    if (positions.has(k)) vector_at<kWidth>(cache.index(), static_cast<int>(threadIdx.x) * kWidth) = own[k].index;
    __syncthreads();
    if (positions.slots > 1 && k > 0) return;
    for (int i = threadIdx.x; i < count; i += kPassThreads) {
      const int position = positions.slots > 1 ? i % slice_values : first + i;
      cache.apply.template flush<0>(cache.tile.sample, cache.tile.begin[1] + position / cache.columns,
                                    cache.tile.begin[2] + position % cache.columns, cache.index()[i]);
    }
  }
}

// The coordinates in x of a vector's first element, and the cache places of its values of the A1 and A2 maps.
struct VectorPlace {
  int64_t slice;
  int64_t row;
  int64_t column;
  int column_at;
  int row_at;
};

template <int kWidth>
struct ApplyConfig {
  static constexpr int kVectors = apply_vectors(kWidth);
  static constexpr int kBatch = 2;  // the number of slices that are loaded before the first is used
};

template <typename Apply, int kWidth>
__global__ void __launch_bounds__(kPassThreads, Apply::kBlocksPerSm)
    apply_kernel(Apply apply, Geometry geometry, Tiling tiling) {
  constexpr int kVectors = ApplyConfig<kWidth>::kVectors;
  constexpr int kBatch = ApplyConfig<kWidth>::kBatch;
  // The last tiles first: of what the reduce pass has read, they are most likely still in the second-level cache.
  const Tile tile = Tile::of_block(geometry, tiling, gridDim.x - 1 - blockIdx.x);
  const ThreadPositions<kWidth> positions(tile);
  const MapCache<Apply> cache(apply, tile);
  const int64_t slice_numel = geometry.size[1] * geometry.size[2];
  MapValues<Apply, kWidth> own[kVectors];
  load_positions(cache, positions, own);

  for (int first = 0; first < tile.size[0]; first += cache.max_slices) {
    const int slices = min(cache.max_slices, tile.size[0] - first);
    cache.load_lines(tile.begin[0] + first, slices);
    __syncthreads();
    const int64_t begin = tile.slice_begin(geometry, first);
    for (int batch = positions.slot; batch < slices; batch += kBatch * positions.slots) {
      using Element = typename Apply::Element;
      Words<Element, kWidth> loaded[kBatch][kVectors];
      const auto each_vector = [&](auto function) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
          for (int k = 0; k < kVectors; ++k) {
            const int slice = batch + b * positions.slots;
            if (slice < slices && positions.has(k))
              function(loaded[b][k], slice, k,
                       begin + slice * slice_numel + positions.row(k) * geometry.size[2] + positions.column(k));
          }
        }
      };
      if constexpr (Apply::kReads)
        each_vector([&](auto& words, int, int, int64_t offset) { words = words_at<kWidth>(apply.in, offset); });
      each_vector([&]([[maybe_unused]] auto& words, int slice, int k, int64_t offset) {
        Vector<Element, kWidth> vector;
        if constexpr (Apply::kReads) vector = as_vector<Element, kWidth>(words);
        const VectorPlace place{tile.begin[0] + first + slice, tile.begin[1] + positions.row(k),
                                tile.begin[2] + positions.column(k), cache.column_at(slice, positions.column(k)),
                                cache.row_at(slice, positions.row(k))};
        apply.apply(vector, own[k], cache, place);
        if constexpr (Apply::kWrites) vector_at<kWidth>(apply.out, offset) = vector;
      });
    }
    __syncthreads();
    if constexpr (Apply::kFindsIndex) cache.flush_lines(tile.begin[0] + first, slices);
  }
  if constexpr (Apply::kFindsIndex) flush_positions(cache, positions, own);
}

template <typename Apply>
void launch_apply(const Apply& apply, const Geometry& geometry, const PassPlan& plan, cudaStream_t stream) {
  with_vector_width<typename Apply::Element>(plan.width, [&](auto width) {
    launch(apply_kernel<Apply, decltype(width)::value>,
           {plan.tiling.blocks(geometry.samples), kPassThreads, MapCache<Apply>::kBytes}, stream, apply, geometry,
           plan.tiling);
  });
}

}  // namespace hashengine::triplet
