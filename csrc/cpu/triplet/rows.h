// Rows of any length in vectors of eight lanes, for the CPU kernels of triplet attention.
//
// A row's last vector is partial if the length is not a multiple of eight. A partial vector is loaded and stored whole
// if enough rows follow it in memory: the extra lanes of a load are not used, and the extra lanes of a store are
// overwritten with the next rows. At the end of the memory, a partial vector is exact: nothing after the row is read or
// written.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/common/lanes.h"
#include "hashengine/simd_level.h"

namespace hashengine {

#ifdef HE_X86
template <typename Body>
HE_TARGET_AVX2 __attribute__((noinline)) void run_with_avx2(const Body& body) {
  body();
}
#endif
// Runs `body`, an HE_INLINE_LAMBDA. On x86 it is compiled for AVX2 and for the baseline, which serves only kScalar.
// float64 is compiled only for the baseline: it is used to check gradients, so its speed does not matter.
template <typename T, typename Body>
void run_at_level([[maybe_unused]] SimdLevel level, const Body& body) {
#ifdef HE_X86
  if constexpr (!std::is_same_v<T, double>) {
    if (level != SimdLevel::kScalar) return run_with_avx2(body);
  }
#endif
  body();
}

// --- vectors of a row ---

struct Whole {};

struct Partial {
  int count;   // lanes that belong to the row, 1 to 7
  bool exact;  // whether the memory after these lanes must not be read or written
};

template <typename Element>
HE_INLINE void copy_first(Element* to, const Element* from, int count) {
  if (count & 4) {
    std::memcpy(to, from, 4 * sizeof(Element));
    to += 4;
    from += 4;
  }
  if (count & 2) {
    std::memcpy(to, from, 2 * sizeof(Element));
    to += 2;
    from += 2;
  }
  if (count & 1) *to = *from;
}

HE_INLINE LaneMask<float> load(const int32_t* from) { return load_vector<LaneMask<float>>(from); }
HE_INLINE LaneMask<double> load(const int64_t* from) { return load_vector<LaneMask<double>>(from); }
HE_INLINE void store(int32_t* to, LaneMask<float> value) { std::memcpy(to, &value, sizeof(value)); }
HE_INLINE void store(int64_t* to, LaneMask<double> value) { std::memcpy(to, &value, sizeof(value)); }
HE_INLINE void store(int32_t* to, LaneMask<double> value) {
  store(to, __builtin_convertvector(value, LaneMask<float>));
}

template <typename Element>
HE_INLINE auto load(const Element* from, Whole) {
  return load(from);
}
template <typename Element>
HE_INLINE auto load(const Element* from, Partial extent) {
  if (!extent.exact) return load(from);
  Element elements[kLanes] = {};
  copy_first(elements, from, extent.count);
  return load(static_cast<const Element*>(elements));
}
template <typename Element, typename Vector>
HE_INLINE void store(Element* to, Vector value, Whole) {
  store(to, value);
}
template <typename Element, typename Vector>
HE_INLINE void store(Element* to, Vector value, Partial extent) {
  if (!extent.exact) return store(to, value);
  Element elements[kLanes];
  store(elements, value);
  copy_first(to, static_cast<const Element*>(elements), extent.count);
}

// The lanes of `value` that belong to the row; `other` in the remaining lanes.
template <typename T>
HE_INLINE Lanes<T> keep_lanes(Lanes<T> value, Lanes<T>, Whole) {
  return value;
}
template <typename T>
HE_INLINE Lanes<T> keep_lanes(Lanes<T> value, Lanes<T> other, Partial extent) {
  return lane_numbers<LaneMask<T>>() < LaneIndex<T>(extent.count) ? value : other;
}

// Calls step(column, extent) for each vector of a row, where extent is Whole or Partial. rows_left: the number of rows,
// this one included, up to the end of the memory that may be read and written.
template <typename Step>
HE_INLINE void for_row(int64_t columns, int64_t rows_left, Step step) {
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t column = 0; column < whole; column += kLanes) step(column, Whole{});
  if (whole < columns) step(whole, Partial{int(columns - whole), rows_left * columns - whole < kLanes});
}

// rows_left for rows that are padded to whole vectors, so that no partial vector is exact.
constexpr int64_t kPaddedRows = kLanes;

// --- across lanes ---

// Combines all lanes by a commutative function. Every lane gets the result.
template <typename Vector, typename Fold>
HE_INLINE Vector fold_lanes(Vector v, Fold fold) {
  v = fold(v, exchange_lanes<4>(v));
  v = fold(v, exchange_lanes<2>(v));
  return fold(v, exchange_lanes<1>(v));
}

template <typename Vector>
HE_INLINE void transpose_lanes(Vector (&rows)[kLanes]) {
  Vector quads[kLanes];  // quads[4 h + j]: columns j and j + 4 of rows 4 h to 4 h + 3
  for (int half = 0; half < kLanes; half += 4) {
    const Vector* r = rows + half;
    const Vector low01 = pick_lanes<0, 8, 1, 9, 4, 12, 5, 13>(r[0], r[1]);
    const Vector high01 = pick_lanes<2, 10, 3, 11, 6, 14, 7, 15>(r[0], r[1]);
    const Vector low23 = pick_lanes<0, 8, 1, 9, 4, 12, 5, 13>(r[2], r[3]);
    const Vector high23 = pick_lanes<2, 10, 3, 11, 6, 14, 7, 15>(r[2], r[3]);
    quads[half + 0] = pick_lanes<0, 1, 8, 9, 4, 5, 12, 13>(low01, low23);
    quads[half + 1] = pick_lanes<2, 3, 10, 11, 6, 7, 14, 15>(low01, low23);
    quads[half + 2] = pick_lanes<0, 1, 8, 9, 4, 5, 12, 13>(high01, high23);
    quads[half + 3] = pick_lanes<2, 3, 10, 11, 6, 7, 14, 15>(high01, high23);
  }
  for (int j = 0; j < 4; ++j) {
    rows[j] = pick_lanes<0, 1, 2, 3, 8, 9, 10, 11>(quads[j], quads[j + 4]);
    rows[j + 4] = pick_lanes<4, 5, 6, 7, 12, 13, 14, 15>(quads[j], quads[j + 4]);
  }
}

// --- small matrices ---

// Copies rows. whole_rows: the rows of `to` are consecutive and complete, so a store may reach into the next row, which
// is written afterwards. If whole_rows is false, nothing outside the columns is written.
template <typename From, typename To>
HE_INLINE void copy_rows(const From* from, int64_t from_pitch, int64_t rows, int64_t columns, To* to, int64_t to_pitch,
                         bool whole_rows = true) {
  for (int64_t row = 0; row < rows; ++row)
    for_row(columns, whole_rows ? rows - row : 0, [&](int64_t column, auto extent) HE_INLINE_LAMBDA {
      store(to + row * to_pitch + column, load(from + row * from_pitch + column), extent);
    });
}

// to[column][row] = from[row][column] for rows [begin, end), where begin is a multiple of eight, and columns [0,
// columns). Reads whole vectors of `from`. In each row of `to`, writes no value at or after column to_width.
template <typename From, typename To>
HE_INLINE void transpose_rows(const From* from, int64_t from_pitch, int64_t begin, int64_t end, int64_t columns, To* to,
                              int64_t to_pitch, int64_t to_width) {
  for (int64_t row = begin; row < end; row += kLanes)
    for (int64_t column = 0; column < columns; column += kLanes) {
      decltype(load(from)) block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(from + std::min(row + i, end - 1) * from_pitch + column);
      transpose_lanes(block);
      const int64_t width = to_width - row;
      for (int j = 0; j < kLanes && column + j < columns; ++j) {
        To* target = to + (column + j) * to_pitch + row;
        if (width >= kLanes) {
          store(target, block[j]);
        } else {
          store(target, block[j], Partial{int(width), true});
        }
      }
    }
}

}  // namespace hashengine
