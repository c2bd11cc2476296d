// The convolution of triplet attention, 2 -> 1 planes of a small map, and its two gradients.
//
// A map is worked through in strips of 32 rows, copied between zero margins so that no tap asks where it lies: strips
// stay in the first-level cache. Eight rows of eight columns are computed at a time, one accumulator a row, so that a
// weight is loaded once for all of them: nine loads for eight multiplications and additions, which is what bounds it.
// Work: 2 K^2 operations a value of the map forward, 4 K^2 backward; the bytes do not count.
#pragma once

#include <cstring>

#include "triplet_layout.h"

namespace hashengine {

constexpr int64_t kStripRows = 32;

// Planes of up to kStripRows rows of a map, with a margin of kernel_size / 2 zeros on each side.
template <typename T>
struct TripletStrip {
  T* values;
  int64_t margin;
  int64_t columns;
  int64_t pitch;
  int64_t plane;  // values of a plane

  static int64_t pitch_of(int64_t columns, int kernel_size) {
    return round_up(round_up(columns, kLanes) + kernel_size - 1, kLanes);
  }
  static int64_t numel(int64_t columns, int kernel_size, int planes) {
    return planes * (kStripRows + kernel_size - 1) * pitch_of(columns, kernel_size);
  }
  TripletStrip(T* memory, int64_t columns, int kernel_size, int planes)
      : values(memory), margin(kernel_size / 2), columns(columns), pitch(pitch_of(columns, kernel_size)),
        plane((kStripRows + kernel_size - 1) * pitch) {
    std::memset(memory, 0, size_t(planes * plane) * sizeof(T));
  }
};

// The values of a strip of `planes` planes, and of a result, that do for every branch.
struct StripSizes {
  int64_t strip = 0;
  int64_t result = 0;

  StripSizes(const TripletLayout& layout, int kernel_size, int planes) {
    for (int b = 0; b < layout.branches; ++b) {
      strip = std::max(strip, TripletStrip<float>::numel(layout.map[b].columns, kernel_size, planes));
      result = std::max(result, kStripRows * layout.map[b].pitch());
    }
  }
};

// Fills a plane around the map's rows [begin, begin + kStripRows): vector(row, column, part) gives the map's values.
template <typename T, typename Vector>
HE_INLINE void fill_strip(const TripletStrip<T>& strip, int plane, int64_t map_rows, int64_t begin, Vector vector) {
  const int64_t margin = strip.margin, columns = strip.columns, pitch = strip.pitch;
  T* to = strip.values + plane * strip.plane;
  for (int64_t row = begin - margin; row < begin + kStripRows + margin; ++row, to += pitch) {
    if (row < 0 || row >= map_rows) {
      std::memset(to + margin, 0, size_t(columns) * sizeof(T));
      continue;
    }
    for_row(columns, map_rows - row, [&](int64_t column, auto part) HE_INLINE_LAMBDA {
      store(to + margin + column, keep<T>(vector(row, column, part), Lanes<T>{}, part));
    });
  }
}

// to[row][column] = sum over planes and taps of strip[plane][row + ky][column + kx] * weight[plane][ky][kx], for whole
// vectors and a multiple of eight rows.
template <int kKernel, typename T>
HE_INLINE void convolve_strip(const TripletStrip<T>& strip, int planes, const T* weight, int kernel_size, int64_t rows,
                              T* to, int64_t to_pitch) {
  const int kernel = kKernel ? kKernel : kernel_size;
  const int64_t pitch = strip.pitch, plane_numel = strip.plane;
  for (int64_t row = 0; row < rows; row += kLanes)
    for (int64_t column = 0; column < strip.columns; column += kLanes) {
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
                                   int kernel_size, int64_t rows, double* total) {
  const int64_t pitch = strip.pitch, columns = strip.columns;
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
