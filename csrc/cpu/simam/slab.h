// SimAM on a slab: planes that are stored side by side, so that eight lanes are one position of eight planes.
//
// A slab is read row by row; a row holds one position of all planes. Statistics and sums are arrays with one value per
// plane, in the first-level cache. Forward: 64 rows at a time are summed. Then, while these rows are in the caches, the
// deviations from the planes' means over the 64 rows are summed, and their squares. A last pass writes the output.
// Backward: one pass computes the two sums that SimamGate needs (formulas.h) and stores those terms of grad_x that do
// not depend on the sums. A second pass adds the terms that do.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/simam/formulas.h"
#include "hashengine/element.h"

namespace hashengine {

// Values [positions][width], with `stride` values from one position to the next. width is at least eight.
struct Slab {
  int64_t positions;
  int64_t width;
  int64_t stride;

  // A row has vectors() vectors, and vector v starts with plane(v). The last vector ends at the end of the row and may
  // overlap the vector before it.
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

// The gates of a slab's planes, in vectors.
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
      const auto gate = SimamGate<T, Lanes<T>>::make(mean, variance, lam);
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

// The forward for slabs of up to `vectors` vectors of planes. x and y point to the slab's first values.
template <typename Element>
class SimamSlabForward {
  using T = typename Arithmetic<Element>::Type;
  static constexpr int64_t kRows = 64;  // positions that are summed in T; these sums are merged in float64

 public:
  explicit SimamSlabForward(int64_t vectors) : gates_(vectors), sums_(vectors), mean_(vectors), squares_(vectors) {}

  HE_INLINE void run(const Slab& slab, const Element* x, Element* y, T* stats, double lam) {
    compute_stats(slab, x, stats);
    gates_.set(slab, stats, lam);
    for (int64_t row = 0; row < slab.positions; ++row, x += slab.stride, y += slab.stride)
      for (int64_t v = 0; v < slab.vectors(); ++v) store(y + slab.plane(v), gates_[v].forward(load(x + slab.plane(v))));
  }

 private:
  HE_INLINE void compute_stats(const Slab& slab, const Element* x, T* stats) {
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

  // Adds rows [begin, end) to the moments of the previous rows.
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
      const Lanes<double> correction = to_double<T>(sum_of(deviations)) / count;  // corrects the rounding of `mean`
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

// The backward for slabs of up to `vectors` vectors of planes.
template <typename Element>
class SimamSlabBackward {
  using T = typename Arithmetic<Element>::Type;
  // Whether the first pass writes its result to grad_x. With half precision it does not, because grad_x would round the
  // result.
  static constexpr bool kInPlace = std::is_same_v<Element, T>;
  static constexpr int64_t kRows = 256;  // positions that are summed in T

 public:
  SimamSlabBackward(int64_t vectors, int64_t positions)
      : gates_(vectors),
        s_(vectors),
        sd_(vectors),
        wide_s_(vectors),
        wide_sd_(vectors),
        mean_s_(vectors),
        slope_(vectors),
        scratch_(kInPlace ? 0 : size_t(vectors * positions * kLanes)) {}

  HE_INLINE void run(const Slab& slab, const Element* grad_y, const Element* x, const T* stats, Element* grad_x,
                     double lam) {
    const int64_t vectors = slab.vectors();
    gates_.set(slab, stats, lam);
    wide_s_.clear();
    wide_sd_.clear();
    for (int64_t begin = 0; begin < slab.positions; begin += kRows)
      add_rows(slab, grad_y, x, grad_x, begin, std::min(begin + kRows, slab.positions));
    for (int64_t v = 0; v < vectors; ++v) {
      mean_s_.set(v, gates_[v].mean_s(from_double<T>(wide_s_[v]), slab.positions));
      slope_.set(v, gates_[v].slope(from_double<T>(wide_sd_[v]), simam_divisor(slab.positions)));
    }
    for (int64_t row = 0; row < slab.positions; ++row) {
      const auto finish = [&](int64_t v, Lanes<T> value) HE_INLINE_LAMBDA {
        const int64_t at = row * slab.stride + slab.plane(v);
        store(grad_x + at, gates_[v].finish(value, load(x + at), mean_s_[v], slope_[v]));
      };
      // The last vector may overlap the vector before it, so it is read before that vector is written.
      const Lanes<T> last = load(direct(slab, grad_x, row, vectors - 1));
      for (int64_t v = 0; v < vectors - 1; ++v) finish(v, load(direct(slab, grad_x, row, v)));
      finish(vectors - 1, last);
    }
  }

 private:
  // The first pass over rows [begin, end): adds to the two sums, and stores at direct() those terms of grad_x that do
  // not depend on the sums.
  HE_INLINE void add_rows(const Slab& slab, const Element* grad_y, const Element* x, Element* grad_x, int64_t begin,
                          int64_t end) {
    s_.clear();
    sd_.clear();
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t v = 0; v < slab.vectors(); ++v) {
        const int64_t at = row * slab.stride + slab.plane(v);
        Lanes<T> s = s_[v], sd = sd_[v];
        store(direct(slab, grad_x, row, v), gates_[v].backward(load(grad_y + at), load(x + at), s, sd));
        s_.set(v, s);
        sd_.set(v, sd);
      }
    }
    for (int64_t v = 0; v < slab.vectors(); ++v) {
      wide_s_.add(v, to_double<T>(s_[v]));
      wide_sd_.add(v, to_double<T>(sd_[v]));
    }
  }

  // The address to which the first pass writes a vector of a row.
  HE_INLINE T* direct(const Slab& slab, Element* grad_x, int64_t row, int64_t vector) {
    if constexpr (kInPlace) {
      return grad_x + row * slab.stride + slab.plane(vector);
    } else {
      return scratch_.data() + (row * slab.vectors() + vector) * kLanes;
    }
  }

  SlabGates<T> gates_;
  LaneArray<T> s_, sd_;
  LaneArray<double> wide_s_, wide_sd_;
  LaneArray<T> mean_s_, slope_;
  std::vector<T> scratch_;
};

}  // namespace hashengine
