// What the layouts of SimAM on the CPU share: the formulas on eight lanes, and how statistics are merged.
//
// S is the type of what belongs to a plane: T where eight lanes are eight positions of one plane, Lanes<T> where they
// are one position of eight planes.
#pragma once

#include <algorithm>

#include "hashengine/simam.h"
#include "lanes.h"

namespace hashengine {

// Below this many values a second thread costs more than it saves.
constexpr int64_t kSimamGrain = 16384;

// Mean and sum of squared deviations of a set that grows by parts (Chan, Golub and LeVeque). A part's deviations are
// taken from its own mean, so that nothing cancels, however far from zero that lies. Real is double or Lanes<double>.
template <typename Real>
struct Moments {
  Real mean{};
  Real squares{};
  double count = 0;

  HE_INLINE void merge(Real part_mean, Real part_squares, double part_count) {
    const double total = count + part_count;
    const Real delta = part_mean - mean;
    mean += delta * (part_count / total);
    squares += part_squares + delta * delta * (count * part_count / total);
    count = total;
  }
};

template <typename Vector>
HE_INLINE Vector sum_of(const Vector (&parts)[4]) {
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// n of the variance.
HE_INLINE double simam_divisor(int64_t positions) { return double(std::max<int64_t>(positions - 1, 1)); }

template <typename T, typename S>
struct SimamGate {
  S mean;
  S energy_scale;    // 1 / (4 (v + lam))
  S exponent_scale;  // -energy_scale, for powers of two

  static HE_INLINE SimamGate of(S mean, S variance, double lam) {
    const S energy_scale = 1 / (4 * (variance + T(lam)));
    return {mean, energy_scale, energy_scale * T(-1.4426950408889634)};
  }

  // (1 - g) / g = e^-energy, where g is the gate and d = x - mean.
  HE_INLINE Lanes<T> odds(Lanes<T> d) const {
    return exp2_nonpositive(d * d * exponent_scale - T(0.5 * 1.4426950408889634));
  }

  HE_INLINE Lanes<T> forward(Lanes<T> x) const { return x / (1 + odds(x - mean)); }

  // Returns the gradient but for what goes through the statistics: dy g + s. With u = s * 2 (v + lam), u goes through
  // the mean and u d through the variance; both are added to their sums.
  HE_INLINE Lanes<T> backward(Lanes<T> grad_y, Lanes<T> x, Lanes<T>& sum_u, Lanes<T>& sum_ud) const {
    const Lanes<T> d = x - mean;
    const Lanes<T> w = odds(d);
    const Lanes<T> g = 1 / (1 + w);
    const Lanes<T> grad = grad_y * g;
    const Lanes<T> u = grad * x * (w * g) * d;
    sum_u += u;
    sum_ud += u * d;
    return grad + u * (2 * energy_scale);
  }

  // The gradient, from what backward returned and the plane's sums of u and of u d.
  HE_INLINE S mean_s(S sum_u, int64_t positions) const { return sum_u * (2 * energy_scale) / T(positions); }
  HE_INLINE S slope(S sum_ud, double n) const { return sum_ud * energy_scale * (8 / T(n) * energy_scale); }
  HE_INLINE Lanes<T> finish(Lanes<T> direct, Lanes<T> x, S mean_s, S slope) const {
    return direct - mean_s - (x - mean) * slope;
  }
};

}  // namespace hashengine
