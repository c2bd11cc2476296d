// One slab of SimAM: planes that lie side by side, so that eight lanes are one position of eight planes.
//
// A slab is read row by row; what belongs to a plane stays in arrays of one value a plane, in the first-level cache.
// Forward: 64 rows at a time are added up, and the deviations from their mean taken while they are in the caches; then
// the output pass. Backward: one pass leaves what needs no sum and adds up the two sums, a second corrects it.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "hashengine/element.h"
#include "simam_lanes.h"

namespace hashengine {

// [positions][width] values, at `stride` values a position; eight or more wide.
struct Slab {
  int64_t positions;
  int64_t width;
  int64_t stride;

  // Vectors of planes: the last ends with the slab, and may share planes with the one before.
  HE_INLINE int64_t vectors() const { return ceil_div<int64_t>(width, kLanes); }
  HE_INLINE int64_t plane(int64_t vector) const { return std::min(vector * kLanes, width - kLanes); }
};

template <typename T>
HE_INLINE Lanes<double> to_double(Lanes<T> v) {
  return __builtin_convertvector(v, Lanes<double>);
}
template <typename T>
HE_INLINE Lanes<T> from_double(Lanes<double> v) {
  return __builtin_convertvector(v, Lanes<T>);
}

// The gates of a slab's planes, a vector at a time.
template <typename T>
class SlabGates {
 public:
  explicit SlabGates(int64_t vectors) : mean_(vectors), energy_scale_(vectors), exponent_scale_(vectors) {}

  // stats: [width, 2].
  HE_INLINE void set(const Slab& slab, const T* stats, double lam) {
    for (int64_t v = 0; v < slab.vectors(); ++v) {
      Lanes<T> mean, variance;
      for (int lane = 0; lane < kLanes; ++lane) {
        mean[lane] = stats[2 * (slab.plane(v) + lane)];
        variance[lane] = stats[2 * (slab.plane(v) + lane) + 1];
      }
      const auto gate = SimamGate<T, Lanes<T>>::of(mean, variance, lam);
      mean_.set(v, gate.mean);
      energy_scale_.set(v, gate.energy_scale);
      exponent_scale_.set(v, gate.exponent_scale);
    }
  }
  HE_INLINE SimamGate<T, Lanes<T>> operator[](int64_t v) const {
    return {mean_[v], energy_scale_[v], exponent_scale_[v]};
  }

 private:
  LaneArray<T> mean_, energy_scale_, exponent_scale_;
};

// Forward over slabs of up to `vectors` vectors of planes. x, y: the slab's first values.
template <typename Element>
class SimamSlabForward {
  using T = typename Arithmetic<Element>::Type;
  static constexpr int64_t kRows = 64;  // positions whose deviations are taken from one mean

 public:
  explicit SimamSlabForward(int64_t vectors) : gates_(vectors), sums_(vectors), mean_(vectors), squares_(vectors) {}

  HE_INLINE void run(const Slab& slab, const Element* x, Element* y, T* stats, double lam) {
    take_stats(slab, x, stats);
    gates_.set(slab, stats, lam);
    for (int64_t row = 0; row < slab.positions; ++row, x += slab.stride, y += slab.stride)
      for (int64_t v = 0; v < slab.vectors(); ++v) store(y + slab.plane(v), gates_[v].forward(load(x + slab.plane(v))));
  }

 private:
  HE_INLINE void take_stats(const Slab& slab, const Element* x, T* stats) {
    mean_.clear();
    squares_.clear();
    for (int64_t row = 0; row < slab.positions; row += kRows)
      add_rows(slab, x, row, std::min(row + kRows, slab.positions));
    for (int64_t v = 0; v < slab.vectors(); ++v) {
      const Lanes<T> mean = from_double<T>(mean_[v]);
      const Lanes<T> variance = from_double<T>(squares_[v] / simam_divisor(slab.positions));
      for (int lane = 0; lane < kLanes; ++lane) {
        stats[2 * (slab.plane(v) + lane)] = mean[lane];
        stats[2 * (slab.plane(v) + lane) + 1] = variance[lane];
      }
    }
  }

  // Merges rows [begin, end) into the moments of the rows before.
  HE_INLINE void add_rows(const Slab& slab, const Element* x, int64_t begin, int64_t end) {
    const int64_t vectors = slab.vectors(), stride = slab.stride;
    sums_.clear();
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) {
      for (int64_t v = 0; v < vectors; ++v) {
        const Element* at = x + row * stride + slab.plane(v);
        sums_.add(v, (load(at) + load(at + stride)) + (load(at + 2 * stride) + load(at + 3 * stride)));
      }
    }
    for (; row < end; ++row)
      for (int64_t v = 0; v < vectors; ++v) sums_.add(v, load(x + row * stride + slab.plane(v)));

    const double count = double(end - begin);
    for (int64_t v = 0; v < vectors; ++v) {
      const Lanes<T> mean = sums_[v] / T(count);
      Lanes<T> deviations[4] = {}, squares[4] = {};
      const auto deviate = [&](int k, int64_t at_row) HE_INLINE_LAMBDA {
        const Lanes<T> d = load(x + at_row * stride + slab.plane(v)) - mean;
        deviations[k] += d;
        squares[k] += d * d;
      };
      for (row = begin; row + 4 <= end; row += 4)
        for (int k = 0; k < 4; ++k) deviate(k, row + k);
      for (; row < end; ++row) deviate(0, row);
      const Lanes<double> correction = to_double<T>(sum_of(deviations)) / count;  // the rounding of the mean
      Moments<Lanes<double>> moments{mean_[v], squares_[v], double(begin)};
      const Lanes<double> rows_squares = to_double<T>(sum_of(squares)) - correction * correction * count;
      moments.merge(to_double<T>(mean) + correction, rows_squares, count);
      mean_.set(v, moments.mean);
      squares_.set(v, moments.squares);
    }
  }

  SlabGates<T> gates_;
  LaneArray<T> sums_;
  LaneArray<double> mean_, squares_;
};

// Backward over slabs of up to `vectors` vectors of planes.
template <typename Element>
class SimamSlabBackward {
  using T = typename Arithmetic<Element>::Type;
  static constexpr bool kInPlace = std::is_same_v<Element, T>;  // half precision cannot hold what the first pass leaves
  static constexpr int64_t kRows = 256;                         // positions that are added up in T

 public:
  SimamSlabBackward(int64_t vectors, int64_t positions)
      : gates_(vectors),
        u_(vectors),
        ud_(vectors),
        wide_u_(vectors),
        wide_ud_(vectors),
        mean_s_(vectors),
        slope_(vectors),
        scratch_(kInPlace ? 0 : size_t(vectors * positions * kLanes)) {}

  HE_INLINE void run(const Slab& slab, const Element* grad_y, const Element* x, const T* stats, Element* grad_x,
                     double lam) {
    const int64_t vectors = slab.vectors();
    gates_.set(slab, stats, lam);
    wide_u_.clear();
    wide_ud_.clear();
    for (int64_t begin = 0; begin < slab.positions; begin += kRows)
      add_rows(slab, grad_y, x, grad_x, begin, std::min(begin + kRows, slab.positions));
    for (int64_t v = 0; v < vectors; ++v) {
      mean_s_.set(v, gates_[v].mean_s(from_double<T>(wide_u_[v]), slab.positions));
      slope_.set(v, gates_[v].slope(from_double<T>(wide_ud_[v]), simam_divisor(slab.positions)));
    }
    for (int64_t row = 0; row < slab.positions; ++row) {
      const auto finish = [&](int64_t v, Lanes<T> value) HE_INLINE_LAMBDA {
        const int64_t at = row * slab.stride + slab.plane(v);
        store(grad_x + at, gates_[v].finish(value, load(x + at), mean_s_[v], slope_[v]));
      };
      // Read before the vector that it shares planes with is written.
      const Lanes<T> last = load(direct(slab, grad_x, row, vectors - 1));
      for (int64_t v = 0; v < vectors - 1; ++v) finish(v, load(direct(slab, grad_x, row, v)));
      finish(vectors - 1, last);
    }
  }

 private:
  // Leaves rows [begin, end) in `direct`, and adds to the sums over all rows.
  HE_INLINE void add_rows(const Slab& slab, const Element* grad_y, const Element* x, Element* grad_x, int64_t begin,
                          int64_t end) {
    u_.clear();
    ud_.clear();
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t v = 0; v < slab.vectors(); ++v) {
        const int64_t at = row * slab.stride + slab.plane(v);
        Lanes<T> u = u_[v], ud = ud_[v];
        store(direct(slab, grad_x, row, v), gates_[v].backward(load(grad_y + at), load(x + at), u, ud));
        u_.set(v, u);
        ud_.set(v, ud);
      }
    }
    for (int64_t v = 0; v < slab.vectors(); ++v) {
      wide_u_.add(v, to_double<T>(u_[v]));
      wide_ud_.add(v, to_double<T>(ud_[v]));
    }
  }

  // Where the first pass leaves a vector of a row.
  HE_INLINE T* direct(const Slab& slab, Element* grad_x, int64_t row, int64_t vector) {
    if constexpr (kInPlace) {
      return grad_x + row * slab.stride + slab.plane(vector);
    } else {
      return scratch_.data() + (row * slab.vectors() + vector) * kLanes;
    }
  }

  SlabGates<T> gates_;
  LaneArray<T> u_, ud_;
  LaneArray<double> wide_u_, wide_ud_;
  LaneArray<T> mean_s_, slope_;
  std::vector<T> scratch_;
};

}  // namespace hashengine
