// The convolution of triplet attention, 2 -> 1 planes of a small map, and its two gradients.
//
// A map is worked through in tiles, copied between zero or neighbouring values so that no tap asks where it lies: a
// tile of a map of any shape stays in the first-level cache. Eight rows of eight columns are computed at a time, one
// accumulator a row, so that a weight is loaded once for all of them: nine loads for eight multiplications and
// additions, which is what bounds it. Work: 2 K^2 operations a value of the map forward, 4 K^2 backward; the bytes do
// not count.
#pragma once

#include <cstring>

#include "triplet_layout.h"

namespace hashengine {

// A rectangle of a map.
struct Tile {
  Range rows;
  Range columns;  // begins with a multiple of eight
  int64_t column_tile;

  int64_t height() const { return rows.end - rows.begin; }
  int64_t width() const { return columns.end - columns.begin; }
};

// How a map is cut into tiles. They are numbered downwards, so that successive ones mostly have the same columns.
struct TripletTiles {
  int64_t map_rows;
  int64_t map_columns;
  int64_t rows;     // of a tile, a multiple of eight
  int64_t columns;  // the same
  int64_t across;
  int64_t down;

  TripletTiles(const TripletMap& map, int64_t parts)
      : map_rows(map.rows),
        map_columns(map.columns),
        columns(std::min(map.pitch(), kMostColumns)),
        across(ceil_div(map.columns, columns)) {
    const int64_t for_each_part = parts == 1 ? map.rows : ceil_div(map.rows * across, parts);
    rows = round_up(std::min({map.rows, for_each_part, kValues / columns, kMostRows}), kLanes);
    down = ceil_div(map.rows, rows);
  }

  Range share(int64_t parts, int64_t part) const {
    return {across * down * part / parts, across * down * (part + 1) / parts};
  }
  Tile operator[](int64_t number) const {
    const int64_t row = number % down * rows, column_tile = number / down, column = column_tile * columns;
    return {{row, std::min(row + rows, map_rows)}, {column, std::min(column + columns, map_columns)}, column_tile};
  }

 private:
  static constexpr int64_t kMostColumns = 64, kMostRows = 128, kValues = 2048;
};

// Planes of a tile, with a margin of kernel_size / 2 values on each side: zeros where the map ends.
template <typename T>
struct TripletStrip {
  T* values;
  int64_t margin;
  int64_t pitch;
  int64_t plane;  // values of a plane
  int64_t numel;  // of all planes
  int64_t column_tile = -1;

  TripletStrip(T* memory, const TripletTiles& tiles, int kernel_size, int planes)
      : values(memory),
        margin(kernel_size / 2),
        pitch(round_up(tiles.columns + kernel_size - 1, kLanes)),
        plane((tiles.rows + kernel_size - 1) * pitch),
        numel(planes * plane) {}

  // Before a tile is filled in: what fill does not write is zero.
  HE_INLINE void prepare(const Tile& tile) {
    if (tile.column_tile == column_tile) return;
    column_tile = tile.column_tile;
    std::memset(values, 0, size_t(numel) * sizeof(T));
  }
};

// Scratch that does for every branch: a strip of two planes with a vector behind it, and the result of a tile.
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

// Fills a plane with a tile and its margins: vector(row, column, part) gives the map's values. A row's last vector may
// reach into the left margin of the next row, or behind the strip, with zeros.
template <typename T, typename Vector>
HE_INLINE void fill_strip(const TripletStrip<T>& strip, int plane, const TripletMap& map, const Tile& tile,
                          Vector vector) {
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
    const int64_t left = (map.rows - row) * map.columns - begin;  // values of the map from here on
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) store(to + i, vector(row, begin + i, Whole{}));
    if (whole < count) {
      const Partial part{int(count - whole), left - whole < kLanes};
      store(to + whole, keep<T>(vector(row, begin + whole, part), Lanes<T>{}, part));
    }
  }
}

// to[row][column] = sum over planes and taps of strip[plane][row + ky][column + kx] * weight[plane][ky][kx], for the
// tile's rows and columns rounded up to eight.
template <int kKernel, typename T>
HE_INLINE void convolve_strip(const TripletStrip<T>& strip, int planes, const T* weight, int kernel_size,
                              const Tile& tile, T* to, int64_t to_pitch) {
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

// total[plane][ky][kx] += sum over the strip of grad[row][column] * strip[plane][row + ky - margin][column + kx -
// margin]. kTaps of a row at a time; a product lane is added up in T over the strip only.
template <int kTaps, typename T>
HE_INLINE void add_weight_gradient(const TripletStrip<T>& strip, int planes, const TripletStrip<T>& grad,
                                   int kernel_size, const Tile& tile, double* total) {
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
