// For kernels that process only maps: their view of the map of a branch, and its tiles.
//
// The reduce pass leaves the map of an axis in memory order and in parts (AxisMap in maps.cuh). A kernel over maps
// merges the parts. It sees the map of a branch as the op saves it, in rows and columns. If the memory order is
// different, this is a transposed view.
#pragma once

#include <algorithm>

#include "cuda/common/maximum.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/triplet/maps.cuh"

namespace hashengine::triplet {

// The tiles of a branch's map. A thread processes kRows consecutive rows of one or two columns of a tile.
struct MapTiling {
  static constexpr int kThreads = 256;
  static constexpr int kRows = 8;
  // The arrays in shared memory in response_backward.cu.
  static constexpr int kBackwardPlanes = 3;

  int64_t first_block;    // the branch's first block in the grid
  int groups;             // threads per column of a tile
  int thread_columns;     // columns per thread
  int columns;            // columns of a tile, a multiple of thread_columns
  unsigned row_threads;   // threads per row of a tile
  unsigned row_tiles;     // number of tiles into which the rows of the map are divided
  unsigned column_tiles;  // number of tiles into which its columns are divided

  __host__ __device__ int64_t blocks(int64_t samples) const { return samples * row_tiles * column_tiles; }
  __host__ __device__ int rows() const { return groups * kRows; }

  // Tiles are about square. A block needs shared memory for the weights and for `planes` arrays. Each array has the
  // size of a tile with its border: kernel_size - 1 more rows and columns. All this must fit into kMaxSharedBytes,
  // unless a single thread needs more. response_backward.cu takes up to 14 KB in addition if kernel_size is 7.
  static MapTiling make(int64_t map_rows, int64_t map_columns, int kernel_size, int thread_columns, int planes,
                        int value_bytes) {
    constexpr int64_t kMaxGroups = 32, kMaxSharedBytes = 80 << 10;
    MapTiling tiling{};
    tiling.thread_columns = thread_columns;
    const int64_t wanted_threads = std::min<int64_t>(ceil_div<int64_t>(map_columns, thread_columns), kWarpThreads);
    const int64_t max_rows = std::min(kMaxGroups, kThreads / wanted_threads) * kRows;
    const int64_t rows = ceil_div(map_rows, ceil_div(map_rows, max_rows));
    tiling.groups = static_cast<int>(ceil_div<int64_t>(rows, kRows));
    const auto cut_columns = [&](int64_t max_columns) {
      const int64_t columns = ceil_div(map_columns, ceil_div(map_columns, max_columns));
      tiling.columns = static_cast<int>(round_up(columns, thread_columns));
    };
    cut_columns(kThreads / tiling.groups * thread_columns);
    while (tiling.groups * tiling.columns > thread_columns &&
           tiling.shared_values(kernel_size, planes) * value_bytes > kMaxSharedBytes) {
      if (tiling.groups > 1) {
        tiling.groups /= 2;
      } else {
        cut_columns(ceil_div(tiling.columns, 2));
      }
    }
    tiling.row_threads = static_cast<unsigned>(tiling.columns / thread_columns);
    tiling.row_tiles = static_cast<unsigned>(ceil_div<int64_t>(map_rows, tiling.rows()));
    tiling.column_tiles = static_cast<unsigned>(ceil_div<int64_t>(map_columns, tiling.columns));
    return tiling;
  }

  // The number of values of a tile with its border: pitch() per row, area() in total.
  __host__ __device__ int pitch(int kernel_size) const { return columns + kernel_size - 1; }
  __host__ __device__ int area(int kernel_size) const { return (rows() + kernel_size - 1) * pitch(kernel_size); }
  // The same for the arrays in response_backward.cu for a kernel_size of 7, in which the values of a column are
  // contiguous. The pitch is 4 times an odd number. Therefore each column of floats begins at a multiple of 16 bytes.
  // If 8 lanes load 16 bytes each from 8 adjacent columns, they use 32 different banks of shared memory.
  __host__ __device__ int column_pitch() const { return rows() + 12; }
  __host__ __device__ int column_area() const { return pitch(7) * column_pitch(); }
  int64_t shared_values(int kernel_size, int planes) const {
    const int plane = planes == kBackwardPlanes && kernel_size == 7 ? column_area() : area(kernel_size);
    return static_cast<int64_t>(planes) * plane + 2 * kernel_size * kernel_size;
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
                         const AxisMaps<Real>& sources, int planes, int thread_columns) {
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
      map.tiling = MapTiling::make(map.rows, map.columns, shape.kernel_size, thread_columns, planes, sizeof(Real));
    }
    for (int b = 1; b < maps.branches; ++b)
      maps.branch[b].tiling.first_block =
          maps.branch[b - 1].tiling.first_block + maps.branch[b - 1].tiling.blocks(geometry.samples);
    return maps;
  }

  // For a kernel without convolution and BatchNorm.
  static BranchMaps without_parameters(const Geometry& geometry, TripletShape shape, const AxisMaps<Real>& sources) {
    shape.kernel_size = 1;
    return make(geometry, shape, {}, sources, 1, 1);
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
    thread_group = static_cast<int>(threadIdx.x / tiling.row_threads);
    thread_column = static_cast<int>(threadIdx.x % tiling.row_threads) * tiling.thread_columns;
  }

  // About the thread's r-th value in its c-th column: whether it is inside the map, its row in the map, and, for the
  // first column, its offset in the map.
  __device__ __forceinline__ bool has(int r, int c = 0) const {
    return thread_group < map.tiling.groups && value_row(r) < map.rows && column + thread_column + c < map.columns;
  }
  // The number of the thread's values in its first column that are inside the map.
  __device__ __forceinline__ int rows_inside() const {
    const int64_t left = map.rows - value_row(0);
    return !has(0) ? 0 : left < MapTiling::kRows ? static_cast<int>(left) : MapTiling::kRows;
  }
  __device__ __forceinline__ int64_t value_row(int r) const { return row + thread_group * MapTiling::kRows + r; }
  __device__ __forceinline__ int64_t offset(int r) const { return value_row(r) * map.columns + column + thread_column; }
};

// The part of a tile with its border that is inside the map. It is divided into lines: rows or, if kByColumns, columns.
// A place is an index within a line. Lines and places are counted from the corner of the border.
template <bool kByColumns>
struct BorderLines {
  int64_t first_line;  // the corner of the border, in the map; both numbers can be negative
  int64_t first_place;
  int begin, end;               // the lines inside the map
  int place_begin, place_end;   // the places inside the map
  int line_pitch, place_pitch;  // in an array of the size of the tile with its border

  template <typename Real>
  __device__ __forceinline__ BorderLines(const MapTile<Real>& tile, int kernel_size) {
    const BranchMap<Real>& map = tile.map;
    const int pitch = map.tiling.pitch(kernel_size), height = map.tiling.rows() + kernel_size - 1;
    const int64_t first_row = tile.row - kernel_size / 2, first_column = tile.column - kernel_size / 2;
    first_line = kByColumns ? first_column : first_row;
    first_place = kByColumns ? first_row : first_column;
    begin = max(0, -static_cast<int>(first_line));
    end = end_of(first_line, kByColumns ? pitch : height, kByColumns ? map.columns : map.rows);
    place_begin = max(0, -static_cast<int>(first_place));
    place_end = end_of(first_place, kByColumns ? height : pitch, kByColumns ? map.rows : map.columns);
    line_pitch = kByColumns ? 1 : pitch;
    place_pitch = kByColumns ? pitch : 1;
  }

  // Loads each value from every array, and calls store(at, offset, values): `offset` is the place in the arrays, in
  // which lines are line_stride apart, from the first value of the map on. `at` is the place in the tile with its
  // border. The lanes of a warp are adjacent along a line. A lane loads from kBatch lines before it calls store. In
  // place of a line that does not exist it loads from the batch's first line again: branches would be more expensive.
  template <int kArrays, typename Real, typename Store>
  __device__ __forceinline__ void visit(const Real* const (&arrays)[kArrays], int64_t line_stride, Store store) const {
    constexpr int kBatch = 4, kWarps = MapTiling::kThreads / kWarpThreads;
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads, lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int64_t batch_stride = kWarps * line_stride;
    for (int batch = begin + warp; batch < end; batch += kBatch * kWarps) {
      int64_t offset = (first_line + batch) * line_stride + first_place + place_begin + lane;
      int at = batch * line_pitch + (place_begin + lane) * place_pitch;
      // One pointer per array: the compiler would add up its parts anew for each line.
      const Real* sources[kArrays];
#pragma unroll
      for (int a = 0; a < kArrays; ++a) sources[a] = arrays[a] + offset;
      for (int i = place_begin + lane; i < place_end; i += kWarpThreads) {
        Vector<Real, kArrays> values[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int64_t step = batch + b * kWarps < end ? b * batch_stride : 0;
#pragma unroll
          for (int a = 0; a < kArrays; ++a) values[b].at[a] = sources[a][step];
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
          if (batch + b * kWarps < end) store(at + b * kWarps * line_pitch, offset + b * batch_stride, values[b]);
        offset += kWarpThreads;
        at += kWarpThreads * place_pitch;
#pragma unroll
        for (int a = 0; a < kArrays; ++a) sources[a] += kWarpThreads;
      }
    }
  }

 private:
  static __device__ __forceinline__ int end_of(int64_t first, int count, int64_t size) {
    return static_cast<int>(min(static_cast<int64_t>(count), size - first));
  }
};

// Fills an array in shared memory with zeros. It must be aligned to 16 bytes. All threads of the block must call it.
template <typename Real>
__device__ __forceinline__ void fill_with_zeros(Real* array, int count) {
  constexpr int kWidth = kVectorBytes / sizeof(Real);
  const int vectors = count / kWidth, thread = static_cast<int>(threadIdx.x);
#pragma unroll 4
  for (int i = thread; i < vectors; i += MapTiling::kThreads) vector_at<kWidth>(array, i * kWidth) = {};
  if (thread < count % kWidth) array[vectors * kWidth + thread] = 0;
}

// Stores the values of two adjacent columns, or only the first.
template <typename Real>
__device__ __forceinline__ void store_pair(Real* at, Real first, Real second, bool has_second) {
  if (has_second && is_aligned(at, 2 * sizeof(Real))) {
    vector_at<2>(at, 0) = {first, second};
    return;
  }
  at[0] = first;
  if (has_second) at[1] = second;
}

// sums[c][r] += the correlation of weights [size, size] with the window that begins r rows below and c columns to the
// right of `window`. kSize is the size if it is known at compile time, otherwise 0. If it is known, the thread loads
// each value of its windows once, for all of its sums. With two columns it loads two values at a time: the pitch must
// be even, and `window` be aligned.
template <int kSize, int kColumns, typename Real>
__device__ __forceinline__ void correlate(Real (&sums)[kColumns][MapTiling::kRows], const Real* window, int pitch,
                                          const Real* weights, int size) {
  constexpr int kRows = MapTiling::kRows;
  if constexpr (kSize > 0) {
#pragma unroll(kColumns > 1 ? kSize : 1)
    for (int first = 0; first < kSize + kColumns - 1; first += kColumns) {
      Vector<Real, kColumns> values[kRows + kSize - 1];
#pragma unroll
      for (int y = 0; y < kRows + kSize - 1; ++y) values[y] = vector_at<kColumns>(window, y * pitch + first);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int x = first + i - c;  // the column of the weights
          if (x < 0 || x >= kSize) continue;
#pragma unroll
          for (int y = 0; y < kSize; ++y) {
            const Real weight = weights[y * kSize + x];
#pragma unroll
            for (int r = 0; r < kRows; ++r) sums[c][r] += weight * values[r + y].at[i];
          }
        }
      }
    }
  } else {
#pragma unroll 1
    for (int x = 0; x < size; ++x) {
#pragma unroll 1
      for (int y = 0; y < size; ++y) {
        const Real weight = weights[y * size + x];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) sums[c][r] += weight * window[(r + y) * pitch + x + c];
        }
      }
    }
  }
}

}  // namespace hashengine::triplet
