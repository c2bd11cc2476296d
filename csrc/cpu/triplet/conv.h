// The convolution of triplet attention, which turns the two planes of a branch's map (maximum and mean) into one plane,
// and its gradients with respect to the input and to the weights.
//
// Idea. A map is processed in tiles, which fit in the first-level cache whatever the map's shape. A tile is copied
// together with a margin of neighbouring values, or zeros, so that the taps need no bounds checks. Eight rows of eight
// columns are computed at a time, with one accumulator per row, so that one load of a weight serves all eight rows.
//
// Cost. With a kernel of K x K taps, each value of the resulting plane takes 2 K^2 multiply-adds forward and 4 K^2
// backward. Eight multiply-adds of vectors need nine loads: eight vectors and a weight. So the loads are the limit; the
// memory traffic is negligible.
#pragma once

#include <cstring>

#include "cpu/triplet/layout.h"

namespace hashengine {

// A rectangle of a map.
struct MapTile {
  Range rows;
  Range columns;        // its begin is a multiple of eight
  int64_t column_tile;  // the index of the column of tiles that contains this tile

  int64_t height() const { return rows.end - rows.begin; }
  int64_t width() const { return columns.end - columns.begin; }
};

// How a map is divided into tiles, and the tiles among the parts of a sample (TripletLayout). The tiles are numbered
// down the columns, so that consecutive tiles mostly have the same columns.
struct TripletTiles {
  int64_t map_rows;
  int64_t map_columns;
  int64_t rows;     // per tile, a multiple of eight
  int64_t columns;  // per tile, a multiple of eight
  int64_t across;   // tiles per row of tiles
  int64_t down;     // tiles per column of tiles

  TripletTiles(const TripletMap& map, int64_t parts)
      : map_rows(map.rows),
        map_columns(map.columns),
        columns(std::min(map.pitch(), kMaxColumns)),
        across(ceil_div(map.columns, columns)) {
    const int64_t rows_per_part = parts == 1 ? map.rows : ceil_div(map.rows * across, parts);
    rows = round_up(std::min({map.rows, rows_per_part, kMaxValues / columns, kMaxRows}), kLanes);
    down = ceil_div(map.rows, rows);
  }

  Range share(int64_t parts, int64_t part) const {
    return {across * down * part / parts, across * down * (part + 1) / parts};
  }
  MapTile operator[](int64_t number) const {
    const int64_t row = number % down * rows, column_tile = number / down, column = column_tile * columns;
    return {{row, std::min(row + rows, map_rows)}, {column, std::min(column + columns, map_columns)}, column_tile};
  }

 private:
  static constexpr int64_t kMaxColumns = 64, kMaxRows = 128, kMaxValues = 2048;
};

// Copies of one or two planes of a tile, each with a margin of kernel_size / 2 values on every side. The values outside
// the map are zero.
template <typename T>
struct TripletStrip {
  T* values;
  int64_t margin;
  int64_t pitch;
  int64_t plane;  // values per plane
  int64_t numel;  // values of all planes
  int64_t column_tile = -1;

  TripletStrip(T* memory, const TripletTiles& tiles, int kernel_size, int planes)
      : values(memory),
        margin(kernel_size / 2),
        pitch(round_up(tiles.columns + kernel_size - 1, kLanes)),
        plane((tiles.rows + kernel_size - 1) * pitch),
        numel(planes * plane) {}

  // Must be called before fill_strip. fill_strip does not write the values to the left and to the right of the map, and
  // these depend on the column of tiles. So prepare() zeroes the strip when the column of tiles changes.
  HE_INLINE void prepare(const MapTile& tile) {
    if (tile.column_tile == column_tile) return;
    column_tile = tile.column_tile;
    std::memset(values, 0, size_t(numel) * sizeof(T));
  }
};

// The sizes, in values, of scratch memory that suffices for every branch. strip: a strip of two planes, followed by one
// vector. result: the convolution's result for one tile.
struct StripSizes {
  int64_t strip = 0;
  int64_t result = 0;

  StripSizes(const TripletLayout& layout, int kernel_size) {
    for (int b = 0; b < layout.branches; ++b) {
      const TripletTiles tiles(layout.map[b], layout.parts);
      strip = std::max(strip, TripletStrip<float>(nullptr, tiles, kernel_size, 2).numel + kLanes);
      result = std::max(result, tiles.rows * tiles.columns);
    }
  }
};

// Fills a plane of the strip with a tile and its margins. load_map(row, column, extent) returns the map's values. A
// row's last vector may write zeros into the left margin of the next row, or after the end of the strip.
template <typename T, typename LoadMap>
HE_INLINE void fill_strip(const TripletStrip<T>& strip, int plane, const TripletMap& map, const MapTile& tile,
                          LoadMap load_map) {
  const int64_t margin = strip.margin, pitch = strip.pitch;
  const int64_t begin = std::max<int64_t>(tile.columns.begin - margin, 0);
  const int64_t count = std::min(tile.columns.end + margin, map.columns) - begin;
  T* to = strip.values + plane * strip.plane + margin + begin - tile.columns.begin;
  const int64_t last = tile.rows.begin + round_up(tile.height(), kLanes) + margin;
  for (int64_t row = tile.rows.begin - margin; row < last; ++row, to += pitch) {
    if (row < 0 || row >= map.rows) {
      std::memset(to, 0, size_t(count) * sizeof(T));
      continue;
    }
    const int64_t remaining = (map.rows - row) * map.columns - begin;  // values up to the end of the map
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) store(to + i, load_map(row, begin + i, Whole{}));
    if (whole < count) {
      const Partial extent{int(count - whole), remaining - whole < kLanes};
      store(to + whole, keep_lanes<T>(load_map(row, begin + whole, extent), Lanes<T>{}, extent));
    }
  }
}

// to[row][column] = sum over planes and taps of strip[plane][row + ky][column + kx] * weight[plane][ky][kx]. The
// numbers of rows and columns are those of the tile, rounded up to multiples of eight. kKernel: kernel_size as a
// constant, or 0.
template <int kKernel, typename T>
HE_INLINE void convolve_strip(const TripletStrip<T>& strip, int planes, const T* weight, int kernel_size,
                              const MapTile& tile, T* to, int64_t to_pitch) {
  const int kernel = kKernel ? kKernel : kernel_size;
  const int64_t pitch = strip.pitch, plane_numel = strip.plane, rows = tile.height(), columns = tile.width();
  for (int64_t row = 0; row < rows; row += kLanes)
    for (int64_t column = 0; column < columns; column += kLanes) {
      Lanes<T> sum[kLanes] = {};
      const T* tap = weight;
      for (int plane = 0; plane < planes; ++plane)
        for (int ky = 0; ky < kernel; ++ky) {
          const T* from = strip.values + plane * plane_numel + (row + ky) * pitch + column;
#pragma GCC unroll 7
          for (int kx = 0; kx < kernel; ++kx, ++tap) {
            const Lanes<T> w = broadcast(*tap);
#pragma GCC unroll 8
            for (int i = 0; i < kLanes; ++i) sum[i] += load(from + i * pitch + kx) * w;
          }
        }
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; ++i) store(to + (row + i) * to_pitch + column, sum[i]);
    }
}

// total[plane][ky][kx] += grad[row + margin][column + margin] * strip[plane][row + ky][column + kx], summed over the
// tile's rows and columns. Computes kTaps neighbouring taps of a row of the kernel at a time. Sums are of type T within
// a tile, and float64 across tiles.
template <int kTaps, typename T>
HE_INLINE void add_weight_gradient(const TripletStrip<T>& strip, int planes, const TripletStrip<T>& grad,
                                   int kernel_size, const MapTile& tile, double* total) {
  const int64_t pitch = strip.pitch, rows = tile.height(), columns = tile.width();
  const T* const grads = grad.values + grad.margin * pitch + grad.margin;
  for (int plane = 0; plane < planes; ++plane)
    for (int ky = 0; ky < kernel_size; ++ky)
      for (int kx = 0; kx < kernel_size; kx += kTaps, total += kTaps) {
        Lanes<T> sum[kTaps] = {};
        for (int64_t row = 0; row < rows; ++row) {
          const T* from = strip.values + plane * strip.plane + (row + ky) * pitch + kx;
          for (int64_t column = 0; column < columns; column += kLanes) {
            const Lanes<T> g = load(grads + row * pitch + column);
#pragma GCC unroll 8
            for (int i = 0; i < kTaps; ++i) sum[i] += g * load(from + column + i);
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kTaps; ++i) total[i] += double(sum_lanes(sum[i]));
      }
}

}  // namespace hashengine
