// How the triplet kernels see memory, and how they cut it.
//
// x lies as [samples][A0][A1][A2]: C, H, W in NCHW and H, W, C in channels_last. The three branches pool A0, A1 and A2
// in either layout; only which branch an axis belongs to and how its map is turned differ, so one kernel serves both.
//
// A block takes a brick: `tile[0]` slices of [tile[1], tile[2]], and streams its slices. A thread keeps to the same
// positions of the tile in every slice, so that what belongs to a position (its maximum and sum over A0, its gate)
// stays in registers. Where a tile has fewer vectors than a block has threads, several slices go at once, a slot each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "hashengine/triplet_attention.h"
#include "vec.cuh"

namespace hashengine {

constexpr int kTripletThreads = 256;

// Vectors of a slice that a thread takes: in a reduction, and where maps are applied, which takes more registers each.
constexpr int triplet_reduce_vectors(int width) { return width == 1 ? 4 : 2; }
constexpr int triplet_apply_vectors(int width) { return width == 1 ? 2 : 1; }

// The map of the branch that pools this axis away; it lies over the two others, "outer" and "inner" in memory's order.
struct TripletAxis {
  int branch;          // or -1: no branch pools it
  int64_t begin;       // of the branch in the flat response and index
  int64_t numel;       // of a sample's map
  int64_t outer_size;  // of the two axes that stay
  int64_t inner_size;
  bool turned;  // the saved map has inner rows and outer columns
};

struct TripletGeometry {
  int64_t samples;
  int64_t size[3];  // A0, A1, A2
  int branches;
  TripletAxis axis[3];

  static TripletGeometry of(const TripletShape& shape) {
    const bool channels_last = shape.layout == FeatureLayout::kChannelsLast;
    const int64_t c = shape.channels, h = shape.height, w = shape.width;
    TripletGeometry geometry{shape.samples, {c, h, w}, shape.branches, {}};
    if (channels_last) geometry = {shape.samples, {h, w, c}, shape.branches, {}};
    enum Branch { kCW, kHC, kHW };
    const int branch_of_axis[2][3] = {{kHW, kCW, kHC}, {kCW, kHC, kHW}};
    int64_t begin[kTripletBranches + 1] = {};
    for (int branch = 0; branch < shape.branches; ++branch) begin[branch + 1] = begin[branch] + shape.map_numel(branch);
    for (int a = 0; a < 3; ++a) {
      const int branch = branch_of_axis[channels_last][a];
      const int64_t outer = geometry.size[a == 0 ? 1 : 0], inner = geometry.size[a == 2 ? 1 : 2];
      const bool turned = channels_last ? a == 0 : a == 2;  // (W, C) of cw, (C, H) of hc
      geometry.axis[a] = {branch < shape.branches ? branch : -1, 0, outer * inner, outer, inner, turned};
      if (branch < shape.branches) geometry.axis[a].begin = begin[branch];
    }
    return geometry;
  }
};

struct TripletTiling {
  int tile[3];
  unsigned parts[3];  // tiles along each axis

  int64_t blocks(int64_t samples) const { return samples * parts[0] * parts[1] * parts[2]; }

  // Tiles of at most `positions` values a slice, rows of whole vectors. Long rows are cut: a map is then made of
  // partial ones, and squarer tiles have fewer of them. A0 is cut only as far as the GPU has room for blocks.
  static TripletTiling of(const TripletGeometry& geometry, int positions, int width) {
    constexpr int64_t kLongestRow = 128, kMostRows = 512, kFewestSlices = 8, kWantedBlocks = 4 * 132;
    TripletTiling tiling;
    tiling.cut(geometry, 2, kLongestRow, width);
    tiling.cut(geometry, 1, std::min<int64_t>(kMostRows, positions / tiling.tile[2]), 1);
    const int64_t blocks = std::max<int64_t>(1, geometry.samples * tiling.parts[1] * tiling.parts[2]);
    const int64_t slices = ceil_div(geometry.size[0], ceil_div(kWantedBlocks, blocks));
    tiling.cut(geometry, 0, std::max(slices, kFewestSlices), 1);
    return tiling;
  }

 private:
  void cut(const TripletGeometry& geometry, int a, int64_t longest, int64_t unit) {
    const int64_t size = geometry.size[a];
    const int64_t even = ceil_div(size, ceil_div(size, longest));
    tile[a] = static_cast<int>(ceil_div(even, unit) * unit);
    parts[a] = static_cast<unsigned>(ceil_div<int64_t>(size, tile[a]));
  }
};

// The widest vector, in elements, that the rows of a shape allow: 16 bytes, 4 bytes or one element. float64, which is
// here for checks of gradients, goes one by one.
inline int triplet_vector_width(const TripletGeometry& geometry, Dtype dtype) {
  const int element_bytes = dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
  for (int bytes : {kVectorBytes, 4})
    if (element_bytes < 8 && geometry.size[2] * element_bytes % bytes == 0) return bytes / element_bytes;
  return 1;
}

// Calls function(std::integral_constant<int, width>()), for a width that triplet_vector_width gives.
template <typename T, typename Function>
void with_vector_width(int width, Function function) {
  if constexpr (sizeof(T) <= 4)
    if (width == kVectorBytes / sizeof(T)) return function(std::integral_constant<int, kVectorBytes / sizeof(T)>());
  if constexpr (sizeof(T) == 2)
    if (width == 2) return function(std::integral_constant<int, 2>());
  function(std::integral_constant<int, 1>());
}

// The part of x that a block works on.
struct Brick {
  int64_t sample;
  unsigned part[3];
  int64_t begin[3];
  int extent[3];

  static __device__ __forceinline__ Brick of_block(const TripletGeometry& geometry, const TripletTiling& tiling) {
    Brick brick;
    unsigned rest = blockIdx.x;
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      brick.part[a] = rest % tiling.parts[a];
      rest /= tiling.parts[a];
      brick.begin[a] = static_cast<int64_t>(brick.part[a]) * tiling.tile[a];
      const int64_t left = geometry.size[a] - brick.begin[a];
      brick.extent[a] = left < tiling.tile[a] ? static_cast<int>(left) : tiling.tile[a];
    }
    brick.sample = rest;
    return brick;
  }

  // Where x has the first value of the brick's slice.
  __device__ __forceinline__ int64_t slice_begin(const TripletGeometry& geometry, int slice) const {
    return ((sample * geometry.size[0] + begin[0] + slice) * geometry.size[1] + begin[1]) * geometry.size[2] + begin[2];
  }
};

// The positions of a tile that a thread keeps to: every kTripletThreads-th vector of kWidth elements, from `first` on.
template <int kWidth>
struct ThreadTile {
  int vectors;      // of the tile
  int row_vectors;  // of a row
  int slots;        // slices at once
  int slot;
  int first;

  explicit __device__ __forceinline__ ThreadTile(const Brick& brick) {
    row_vectors = brick.extent[2] / kWidth;
    vectors = brick.extent[1] * row_vectors;
    const int thread = static_cast<int>(threadIdx.x);
    slots = vectors < kTripletThreads ? kTripletThreads / vectors : 1;
    slot = slots > 1 ? thread / vectors : 0;
    first = slots > 1 ? thread % vectors : thread;
  }
  __device__ __forceinline__ int vector(int k) const { return first + k * kTripletThreads; }
  __device__ __forceinline__ bool has(int k) const { return slot < slots && vector(k) < vectors; }
  __device__ __forceinline__ int row(int k) const { return vector(k) / row_vectors; }
  __device__ __forceinline__ int column(int k) const { return vector(k) % row_vectors * kWidth; }
};

}  // namespace hashengine
