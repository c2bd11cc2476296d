// For kernels that process only maps: their view of the map of a branch, and its tiles.
//
// The reduce pass leaves the map of an axis in memory order and in parts (AxisMap in maps.cuh). A kernel over maps
// merges the parts. It sees the map of a branch as the op saves it, in rows and columns. If the memory order is
// different, this is a transposed view.
#pragma once

#include <algorithm>

#include "cuda/common/maximum.cuh"
#include "cuda/triplet/maps.cuh"

namespace hashengine::triplet {

// The tiles of a branch's map. A thread processes kRows consecutive rows of one column of a tile.
struct MapTiling {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 8;
  int64_t first_block;    // the branch's first block in the grid
  int groups;             // threads per column of a tile
  int columns;            // columns of a tile
  unsigned row_tiles;     // number of tiles into which the rows of the map are divided
  unsigned column_tiles;  // number of tiles into which its columns are divided

  __host__ __device__ int64_t blocks(int64_t samples) const { return samples * row_tiles * column_tiles; }
  __host__ __device__ int rows() const { return groups * kRows; }

  // Tiles are about square. A block needs shared memory for the weights and for `planes` arrays. Each array has the
  // size of a tile with its border: kernel_size - 1 more rows and columns. All this must fit into kMaxSharedBytes.
  static MapTiling make(int64_t map_rows, int64_t map_columns, int kernel_size, int planes, int value_bytes) {
    constexpr int64_t kWantedColumns = 32, kMaxGroups = 16, kMaxSharedBytes = 96 << 10;
    MapTiling tiling{};
    const int64_t wanted = std::min(kMaxGroups, kThreads / std::min(map_columns, kWantedColumns));
    tiling.groups = static_cast<int>(std::min(ceil_div<int64_t>(map_rows, kRows), wanted));
    const auto cut_columns = [&](int64_t max_columns) {
      tiling.columns = static_cast<int>(ceil_div(map_columns, ceil_div(map_columns, max_columns)));
    };
    cut_columns(kThreads / tiling.groups);
    while (tiling.groups * tiling.columns > 1 &&
           tiling.shared_values(kernel_size, planes) * value_bytes > kMaxSharedBytes) {
      if (tiling.groups > 1) {
        tiling.groups /= 2;
      } else {
        cut_columns(ceil_div(tiling.columns, 2));
      }
    }
    tiling.row_tiles = static_cast<unsigned>(ceil_div<int64_t>(map_rows, tiling.rows()));
    tiling.column_tiles = static_cast<unsigned>(ceil_div<int64_t>(map_columns, tiling.columns));
    return tiling;
  }

  // The number of values of a tile with its border: pitch() per row, area() in total.
  __host__ __device__ int pitch(int kernel_size) const { return columns + kernel_size - 1; }
  __host__ __device__ int area(int kernel_size) const { return (rows() + kernel_size - 1) * pitch(kernel_size); }
  int64_t shared_values(int kernel_size, int planes) const {
    return static_cast<int64_t>(planes) * area(kernel_size) + 2 * kernel_size * kernel_size;
  }
};

template <typename Real>
struct BranchMap {
  int64_t rows;
  int64_t columns;
  int64_t flat_begin;  // offset of the branch's maps in flat arrays of one channel
  AxisMap<Real> source;
  int64_t row_stride;  // the strides of the source
  int64_t column_stride;
  int64_t pooled_length;  // the length of the axis that the branch pools
  const Real* conv_weight;
  const Real* bn_weight;
  const Real* bn_bias;
  MapTiling tiling;
  bool is_saved;      // whether the source is saved.pooled itself, which the forward saves for the backward
  bool shares_index;  // whether several threads of the apply pass search one line along the pooled axis

  __device__ __forceinline__ int64_t numel() const { return rows * columns; }
  __device__ __forceinline__ const Real* source_at(int64_t sample, int64_t row, int64_t column) const {
    return source.data + sample * source.sample_stride + row * row_stride + column * column_stride;
  }
};

template <typename Real>
struct BranchMaps {
  BranchMap<Real> branch[kTripletBranches];
  int branches;
  int kernel_size;
  int64_t samples;
  double eps;

  int64_t blocks() const {
    const BranchMap<Real>& last = branch[branches - 1];
    return last.tiling.first_block + last.tiling.blocks(samples);
  }
  // The largest MapTiling::shared_values() of the branches.
  int64_t shared_values(int planes) const {
    int64_t values = 0;
    for (int b = 0; b < branches; ++b) values = std::max(values, branch[b].tiling.shared_values(kernel_size, planes));
    return values;
  }

  static BranchMaps make(const Geometry& geometry, const TripletShape& shape, const TripletParameters& parameters,
                         const AxisMaps<Real>& sources, int planes) {
    BranchMaps maps{};
    maps.branches = geometry.branches;
    maps.kernel_size = shape.kernel_size;
    maps.samples = geometry.samples;
    maps.eps = parameters.eps;
    for (int a = 0; a < 3; ++a) {
      const Axis& axis = geometry.axis[a];
      if (axis.branch < 0) continue;
      BranchMap<Real>& map = maps.branch[axis.branch];
      map.rows = axis.transposed ? axis.inner_size : axis.outer_size;
      map.columns = axis.transposed ? axis.outer_size : axis.inner_size;
      map.flat_begin = axis.flat_begin;
      map.source = sources.axis[a];
      map.row_stride = axis.transposed ? 1 : map.source.outer_stride;
      map.column_stride = axis.transposed ? map.source.outer_stride : 1;
      map.pooled_length = geometry.size[a];
      map.conv_weight = static_cast<const Real*>(parameters.conv_weight[axis.branch]);
      map.bn_weight = static_cast<const Real*>(parameters.bn_weight[axis.branch]);
      map.bn_bias = static_cast<const Real*>(parameters.bn_bias[axis.branch]);
      map.tiling = MapTiling::make(map.rows, map.columns, shape.kernel_size, planes, sizeof(Real));
    }
    for (int b = 1; b < maps.branches; ++b)
      maps.branch[b].tiling.first_block =
          maps.branch[b - 1].tiling.first_block + maps.branch[b - 1].tiling.blocks(geometry.samples);
    return maps;
  }

  // For a kernel without convolution and BatchNorm.
  static BranchMaps without_parameters(const Geometry& geometry, TripletShape shape, const AxisMaps<Real>& sources) {
    shape.kernel_size = 1;
    return make(geometry, shape, {}, sources, 1);
  }
};

// One pointer per branch. operator[] reads the array at constant indices only. With a variable index, the compiler
// would copy the kernel's parameters to local memory.
template <typename T>
struct BranchPointers {
  T* branch[kTripletBranches];

  template <typename Pointer>
  static BranchPointers make(Pointer const (&data)[kTripletBranches]) {
    BranchPointers pointers;
    for (int b = 0; b < kTripletBranches; ++b) pointers.branch[b] = static_cast<T*>(data[b]);
    return pointers;
  }
  __device__ __forceinline__ T* operator[](int index) const {
    T* pointer = branch[0];
#pragma unroll
    for (int b = 1; b < kTripletBranches; ++b)
      if (b == index) pointer = branch[b];
    return pointer;
  }
};

// The tile that a block processes, and the thread's place in it.
template <typename Real>
struct MapTile {
  BranchMap<Real> map;
  int branch;
  int64_t sample;
  int64_t row;  // the row and the column of the tile's first value
  int64_t column;
  int thread_group;
  int thread_column;

  explicit __device__ __forceinline__ MapTile(const BranchMaps<Real>& maps) {
    branch = 0;
    map = maps.branch[0];
#pragma unroll
    for (int b = 1; b < kTripletBranches; ++b) {  // constant indices, as in BranchPointers
      if (b >= maps.branches || blockIdx.x < maps.branch[b].tiling.first_block) continue;
      branch = b;
      map = maps.branch[b];
    }
    const MapTiling& tiling = map.tiling;
    unsigned rest = blockIdx.x - static_cast<unsigned>(tiling.first_block);
    column = static_cast<int64_t>(rest % tiling.column_tiles) * tiling.columns;
    rest /= tiling.column_tiles;
    row = static_cast<int64_t>(rest % tiling.row_tiles) * tiling.rows();
    sample = rest / tiling.row_tiles;
    thread_group = static_cast<int>(threadIdx.x) / tiling.columns;
    thread_column = static_cast<int>(threadIdx.x) % tiling.columns;
  }

  // About the thread's r-th value: whether it is inside the map, its row in the map, and its offset in the map.
  __device__ __forceinline__ bool has(int r) const {
    return thread_group < map.tiling.groups && value_row(r) < map.rows && column + thread_column < map.columns;
  }
  __device__ __forceinline__ int64_t value_row(int r) const { return row + thread_group * MapTiling::kRows + r; }
  __device__ __forceinline__ int64_t offset(int r) const { return value_row(r) * map.columns + column + thread_column; }
};

// sums[r] += the correlation of weights [size, size] with the window that begins r rows below `window`. kSize is the
// size if it is known at compile time, otherwise 0. If it is known, the thread loads each value of its windows and each
// weight once, for all of its kRows sums.
template <int kSize, typename Real>
__device__ __forceinline__ void correlate(Real (&sums)[MapTiling::kRows], const Real* window, int pitch,
                                          const Real* weights, int size) {
  const int n = kSize > 0 ? kSize : size;
#pragma unroll 1
  for (int x = 0; x < n; ++x) {
#pragma unroll(kSize > 0 ? kSize : 1)
    for (int y = 0; y < n; ++y) {
      const Real weight = weights[y * n + x];
#pragma unroll
      for (int r = 0; r < MapTiling::kRows; ++r) sums[r] += weight * window[(r + y) * pitch + x];
    }
  }
}

}  // namespace hashengine::triplet
