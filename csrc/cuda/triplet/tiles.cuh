// How the triplet kernels address x, and how a pass over x is cut into tiles.
//
// x is stored as [samples][A0][A1][A2]. The axes A0, A1, A2 are C, H, W in NCHW and H, W, C in channels_last. The three
// branches pool A0, A1 and A2 in both layouts. Only the branch of an axis and the orientation of its map depend on the
// layout, so one kernel serves both.
//
// A block processes one tile of x, slice by slice. A slice is the part of the tile at one index of A0. A thread
// processes the same positions (rows and columns) of every slice. The values of a position (its maximum and sum over
// A0, its gate) therefore stay in registers. If a slice has at most half as many vectors as the block has threads, the
// block divides its threads into several "slots" and processes one slice per slot at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "hashengine/triplet_attention.h"

namespace hashengine::triplet {

constexpr int kPassThreads = 256;  // threads per block of a pass over x

// The number of vectors of a slice per thread. The apply pass (apply.cuh) needs more registers per vector than the
// reduce pass (reduce.cu), in which the vectors of a thread are in different rows.
template <typename Real>
constexpr int reduce_vectors(int width) {
  return width <= 2 && sizeof(Real) < 8 ? 8 : 4;
}
constexpr int apply_vectors(int width) { return width == 1 ? 2 : 1; }

// An axis of x and the map of the branch that pools it. The map extends over the two remaining axes: "outer" and
// "inner", in memory order.
struct Axis {
  int branch;          // -1: no branch pools this axis
  int64_t flat_begin;  // offset of the branch's maps in the flat arrays of one channel
  int64_t numel;       // values of the map per sample
  int64_t outer_size;
  int64_t inner_size;
  bool transposed;  // whether the op stores the map as [inner, outer], in contrast to memory order
};

struct Geometry {
  int64_t samples;
  int64_t size[3];  // the sizes of A0, A1, A2
  int branches;
  Axis axis[3];

  static Geometry from_shape(const TripletShape& shape) {
    const bool channels_last = shape.layout == FeatureLayout::kChannelsLast;
    const int64_t c = shape.channels, h = shape.height, w = shape.width;
    Geometry geometry{shape.samples, {c, h, w}, shape.branches, {}};
    if (channels_last) geometry = {shape.samples, {h, w, c}, shape.branches, {}};
    enum Branch { kCW, kHC, kHW };
    const int branch_of_axis[2][3] = {{kHW, kCW, kHC}, {kCW, kHC, kHW}};
    int64_t flat_begin[kTripletBranches + 1] = {};
    for (int branch = 0; branch < shape.branches; ++branch)
      flat_begin[branch + 1] = flat_begin[branch] + shape.map_numel(branch);
    for (int a = 0; a < 3; ++a) {
      const int branch = branch_of_axis[channels_last][a];
      const int64_t outer = geometry.size[a == 0 ? 1 : 0], inner = geometry.size[a == 2 ? 1 : 2];
      // In memory order, the cw map of channels_last is [W, C], and the hc map of NCHW is [C, H].
      const bool transposed = channels_last ? a == 0 : a == 2;
      geometry.axis[a] = {branch < shape.branches ? branch : -1, 0, outer * inner, outer, inner, transposed};
      if (branch < shape.branches) geometry.axis[a].flat_begin = flat_begin[branch];
    }
    return geometry;
  }
};

struct Tiling {
  int tile_size[3];
  unsigned tile_count[3];  // along each axis

  int64_t blocks(int64_t samples) const { return samples * tile_count[0] * tile_count[1] * tile_count[2]; }

  // Makes tiles of rows of whole vectors. A slice has at most `thread_vectors` vectors per thread, if the threads that
  // process the same columns process whole rows. If a tile does not span an axis, the reduce pass writes the map of
  // that axis in parts (AxisMap in maps.cuh). Square tiles give the fewest parts, so long rows are cut. A0 is cut only
  // until the multiprocessors have enough blocks.
  static Tiling make(const Geometry& geometry, int thread_vectors, int width, int64_t multiprocessors) {
    constexpr int64_t kMaxColumns = 128, kMaxRows = 512, kMinSlices = 8, kBlocksPerMultiprocessor = 4;
    Tiling tiling;
    tiling.cut(geometry, 2, kMaxColumns, width);
    const int row_vectors = tiling.tile_size[2] / width;
    tiling.cut(geometry, 1, std::min<int64_t>(kMaxRows, kPassThreads / row_vectors * thread_vectors), 1);
    const int64_t blocks = std::max<int64_t>(1, geometry.samples * tiling.tile_count[1] * tiling.tile_count[2]);
    const int64_t slices = ceil_div(geometry.size[0], ceil_div(kBlocksPerMultiprocessor * multiprocessors, blocks));
    tiling.cut(geometry, 0, std::max(slices, kMinSlices), 1);
    return tiling;
  }

 private:
  // Cuts axis `a` into tiles of equal size (the last can be smaller). The size is a multiple of `unit`, and at most
  // `max_size` if that is a multiple of `unit`.
  void cut(const Geometry& geometry, int a, int64_t max_size, int64_t unit) {
    const int64_t size = geometry.size[a];
    const int64_t even = ceil_div(size, ceil_div(size, max_size));
    tile_size[a] = static_cast<int>(ceil_div(even, unit) * unit);
    tile_count[a] = static_cast<unsigned>(ceil_div<int64_t>(size, tile_size[a]));
  }
};

// The launch plan of one pass over x. It depends on the shape, on the vector width, and on the device's number of
// multiprocessors.
struct PassPlan {
  int width;  // elements per vector
  Tiling tiling;

  // Real: the type of the sums.
  template <typename Real>
  static PassPlan for_reduce(const Geometry& geometry, int width) {
    return make(geometry, width, reduce_vectors<Real>(width));
  }
  static PassPlan for_apply(const Geometry& geometry, int width) { return make(geometry, width, apply_vectors(width)); }
  // Whether the lines along this axis are divided among several blocks.
  bool splits(int axis) const { return tiling.tile_count[axis] > 1; }

 private:
  static PassPlan make(const Geometry& geometry, int width, int thread_vectors) {
    return {width, Tiling::make(geometry, thread_vectors, width, device_attribute(cudaDevAttrMultiProcessorCount))};
  }
};

// The number of elements of the widest vector that divides the length of A2: 16 bytes, 4 bytes or one element. For
// float64, which exists for gradient checks only, the number is always 1.
inline int widest_vector(const Geometry& geometry, Dtype dtype) {
  const int element_bytes = dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
  for (int bytes : {kVectorBytes, 4})
    if (element_bytes < 8 && geometry.size[2] * element_bytes % bytes == 0) return bytes / element_bytes;
  return 1;
}

// The result of widest_vector if both arrays are aligned to 16 bytes, otherwise 1.
inline int vector_width(const Geometry& geometry, Dtype dtype, const void* x, const void* y) {
  return is_aligned(x) && is_aligned(y) ? widest_vector(geometry, dtype) : 1;
}

// Calls function(std::integral_constant<int, width>()) for a width that widest_vector returns for T.
template <typename T, typename Function>
void with_vector_width(int width, Function function) {
  if constexpr (sizeof(T) <= 4)
    if (width == kVectorBytes / sizeof(T)) return function(std::integral_constant<int, kVectorBytes / sizeof(T)>());
  if constexpr (sizeof(T) == 2)
    if (width == 2) return function(std::integral_constant<int, 2>());
  function(std::integral_constant<int, 1>());
}

// The tile of x that a block processes.
struct Tile {
  int64_t sample;
  unsigned index[3];  // the number of the tile along each axis
  int64_t begin[3];
  int size[3];

  static __device__ __forceinline__ Tile of_block(const Geometry& geometry, const Tiling& tiling, unsigned block) {
    Tile tile;
    unsigned rest = block;
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      tile.index[a] = rest % tiling.tile_count[a];
      rest /= tiling.tile_count[a];
      tile.begin[a] = static_cast<int64_t>(tile.index[a]) * tiling.tile_size[a];
      const int64_t left = geometry.size[a] - tile.begin[a];
      tile.size[a] = left < tiling.tile_size[a] ? static_cast<int>(left) : tiling.tile_size[a];
    }
    tile.sample = rest;
    return tile;
  }

  // Offset in x of the first value of a slice of the tile.
  __device__ __forceinline__ int64_t slice_begin(const Geometry& geometry, int slice) const {
    return ((sample * geometry.size[0] + begin[0] + slice) * geometry.size[1] + begin[1]) * geometry.size[2] + begin[2];
  }
};

// The positions of a slice that a thread of the apply pass processes. The vectors (of kWidth elements) of a slice are
// numbered. The thread processes the vectors `first`, `first + kPassThreads` and so on.
template <int kWidth>
struct ThreadPositions {
  static constexpr int kMostVectors = apply_vectors(kWidth);
  int slice_vectors;
  int row_vectors;
  int slots;  // slices that the block processes at a time
  int slot;   // the slot of this thread
  int first;
  // Row and first column of each vector. They are divided here, because the compiler does not move a division out of
  // the loop in which it is guarded.
  int rows[kMostVectors], columns[kMostVectors];

  explicit __device__ __forceinline__ ThreadPositions(const Tile& tile) {
    row_vectors = tile.size[2] / kWidth;
    slice_vectors = tile.size[1] * row_vectors;
    const int thread = static_cast<int>(threadIdx.x);
    slots = slice_vectors < kPassThreads ? kPassThreads / slice_vectors : 1;
    slot = slots > 1 ? thread / slice_vectors : 0;
    first = slots > 1 ? thread % slice_vectors : thread;
#pragma unroll
    for (int k = 0; k < kMostVectors; ++k) {
      rows[k] = vector(k) / row_vectors;
      columns[k] = (vector(k) - rows[k] * row_vectors) * kWidth;
    }
  }
  // About the thread's k-th vector: its number, whether it exists, its row, and the column of its first element.
  __device__ __forceinline__ int vector(int k) const { return first + k * kPassThreads; }
  __device__ __forceinline__ bool has(int k) const { return slot < slots && vector(k) < slice_vectors; }
  __device__ __forceinline__ int row(int k) const { return rows[k]; }
  __device__ __forceinline__ int column(int k) const { return columns[k]; }
};

}  // namespace hashengine::triplet
