// The maps as the triplet kernels hand them to each other.
//
// A reduction writes a map an axis, in the order of the axes in memory ("outer", "inner") and in as many parts as its
// tiling cuts that axis; a kernel over maps adds the parts up and sees the map of a branch as the op saves it, rows and
// columns, turned where memory's order is the other one.
#pragma once

#include <algorithm>

#include "maximum.cuh"
#include "triplet_tiles.cuh"

namespace hashengine {

// A map of one axis: [part][sample][channel][outer][inner]; two channels, maximum and mean, or one, a sum.
template <typename Real>
struct AxisMap {
  Real* data;  // null: no branch pools this axis
  int parts;
  int64_t part_stride;
  int64_t sample_stride;
  int64_t channel_stride;
  int64_t outer_stride;
  Real scale;  // of the sums
};

template <typename Real>
struct AxisMaps {
  AxisMap<Real> axis[3];

  __device__ __forceinline__ bool has(int a) const { return axis[a].data != nullptr; }

  // Outer and inner count from the brick's corner.
  template <bool kHasMaximum>
  __device__ __forceinline__ void store(int a, const Brick& brick, int outer, int inner, Real largest, Real sum) const {
    const AxisMap<Real>& map = axis[a];
    const int64_t row = brick.begin[a == 0 ? 1 : 0] + outer, column = brick.begin[a == 2 ? 1 : 2] + inner;
    Real* at =
        map.data + brick.part[a] * map.part_stride + brick.sample * map.sample_stride + row * map.outer_stride + column;
    if constexpr (kHasMaximum) {
      at[0] = largest;
      at += map.channel_stride;
    }
    *at = sum * map.scale;
  }
};

// A branch's map cut into tiles of whole threads: a thread takes kRows rows of one column.
struct MapTiling {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 8;
  int64_t first_block;
  int groups;  // threads above each other
  int columns;
  unsigned down;
  unsigned across;

  __host__ __device__ int64_t blocks(int64_t samples) const { return samples * down * across; }
  __host__ __device__ int rows() const { return groups * kRows; }

  // With a border of kernel_size - 1, `planes` of them and the weights have to fit into shared memory.
  static MapTiling of(int64_t map_rows, int64_t map_columns, int kernel_size, int planes, int value_bytes) {
    constexpr int64_t kSquare = 32, kMostGroups = 16, kSharedBytes = 96 << 10;
    MapTiling tiling{};
    const int64_t wanted = std::min(kMostGroups, kThreads / std::min(map_columns, kSquare));
    tiling.groups = static_cast<int>(std::min(ceil_div<int64_t>(map_rows, kRows), wanted));
    const auto cut_columns = [&](int64_t longest) {
      tiling.columns = static_cast<int>(ceil_div(map_columns, ceil_div(map_columns, longest)));
    };
    cut_columns(kThreads / tiling.groups);
    while (tiling.groups * tiling.columns > 1 &&
           tiling.shared_values(kernel_size, planes) * value_bytes > kSharedBytes) {
      if (tiling.groups > 1) {
        tiling.groups /= 2;
      } else {
        cut_columns(ceil_div(tiling.columns, 2));
      }
    }
    tiling.down = static_cast<unsigned>(ceil_div<int64_t>(map_rows, tiling.rows()));
    tiling.across = static_cast<unsigned>(ceil_div<int64_t>(map_columns, tiling.columns));
    return tiling;
  }

  __host__ __device__ int pitch(int kernel_size) const { return columns + kernel_size - 1; }
  __host__ __device__ int area(int kernel_size) const { return (rows() + kernel_size - 1) * pitch(kernel_size); }
  int64_t shared_values(int kernel_size, int planes) const {
    return static_cast<int64_t>(planes) * area(kernel_size) + 2 * kernel_size * kernel_size;
  }
};

// A branch as a kernel over maps sees it.
template <typename Real>
struct BranchMap {
  int64_t rows;
  int64_t columns;
  int64_t begin;  // of the branch in flat arrays of one channel
  AxisMap<Real> source;
  int64_t row_stride;  // in the source
  int64_t column_stride;
  int64_t pooled_length;
  const Real* conv_weight;
  const Real* bn_weight;
  const Real* bn_bias;
  MapTiling tiling;
  bool is_saved;      // the source is the saved map itself
  bool shares_index;  // several blocks may find a maximum of one line

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
  int64_t shared_values(int planes) const {
    int64_t values = 0;
    for (int b = 0; b < branches; ++b) values = std::max(values, branch[b].tiling.shared_values(kernel_size, planes));
    return values;
  }

  static BranchMaps of(const TripletGeometry& geometry, const TripletShape& shape, const TripletParameters& parameters,
                       const AxisMaps<Real>& sources, int planes) {
    BranchMaps maps{};
    maps.branches = geometry.branches;
    maps.kernel_size = shape.kernel_size;
    maps.samples = geometry.samples;
    maps.eps = parameters.eps;
    for (int a = 0; a < 3; ++a) {
      const TripletAxis& axis = geometry.axis[a];
      if (axis.branch < 0) continue;
      BranchMap<Real>& map = maps.branch[axis.branch];
      map.rows = axis.turned ? axis.inner_size : axis.outer_size;
      map.columns = axis.turned ? axis.outer_size : axis.inner_size;
      map.begin = axis.begin;
      map.source = sources.axis[a];
      map.row_stride = axis.turned ? 1 : map.source.outer_stride;
      map.column_stride = axis.turned ? map.source.outer_stride : 1;
      map.pooled_length = geometry.size[a];
      map.conv_weight = static_cast<const Real*>(parameters.conv_weight[axis.branch]);
      map.bn_weight = static_cast<const Real*>(parameters.bn_weight[axis.branch]);
      map.bn_bias = static_cast<const Real*>(parameters.bn_bias[axis.branch]);
      map.tiling = MapTiling::of(map.rows, map.columns, shape.kernel_size, planes, sizeof(Real));
    }
    for (int b = 1; b < maps.branches; ++b)
      maps.branch[b].tiling.first_block =
          maps.branch[b - 1].tiling.first_block + maps.branch[b - 1].tiling.blocks(geometry.samples);
    return maps;
  }
};

// The tile of a block.
template <typename Real>
struct MapTile {
  BranchMap<Real> map;
  int branch;
  int64_t sample;
  int64_t row;
  int64_t column;
  int thread_group;
  int thread_column;

  explicit __device__ __forceinline__ MapTile(const BranchMaps<Real>& maps) {
    branch = 0;
    map = maps.branch[0];
#pragma unroll
    for (int b = 1; b < kTripletBranches; ++b) {  // constant indices: the parameters need not move to local memory
      if (b >= maps.branches || blockIdx.x < maps.branch[b].tiling.first_block) continue;
      branch = b;
      map = maps.branch[b];
    }
    const MapTiling& tiling = map.tiling;
    unsigned rest = blockIdx.x - static_cast<unsigned>(tiling.first_block);
    column = static_cast<int64_t>(rest % tiling.across) * tiling.columns;
    rest /= tiling.across;
    row = static_cast<int64_t>(rest % tiling.down) * tiling.rows();
    sample = rest / tiling.down;
    thread_group = static_cast<int>(threadIdx.x) / tiling.columns;
    thread_column = static_cast<int>(threadIdx.x) % tiling.columns;
  }

  // Whether the thread's r-th value lies in the map, and where.
  __device__ __forceinline__ bool has(int r) const {
    return thread_group < map.tiling.groups && value_row(r) < map.rows && column + thread_column < map.columns;
  }
  __device__ __forceinline__ int64_t value_row(int r) const { return row + thread_group * MapTiling::kRows + r; }
  __device__ __forceinline__ int64_t offset(int r) const { return value_row(r) * map.columns + column + thread_column; }
};

// sums[r] += the correlation of weights [size, size] with the window of the tile that begins r rows below `window`.
// Each value of the tile and each weight is loaded once for the thread's kRows sums.
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

}  // namespace hashengine
