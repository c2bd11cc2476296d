// The formulas of SimAM on eight lanes, and the merging of statistics, for all layouts on the CPU.
//
// S is the type of a plane's statistics: T if the eight lanes of a vector hold eight positions of one plane, Lanes<T>
// if they hold one position of eight planes.
#pragma once

#include <algorithm>

#include "cpu/common/lanes.h"
#include "hashengine/simam.h"

namespace hashengine {

// Fewer values are not worth a second thread.
constexpr int64_t kSimamGrain = 16384;

// Mean and sum of squared deviations of a set to which parts are added (Chan, Golub and LeVeque). The deviations of a
// part are taken from the part's own mean, so that a mean far from zero causes no cancellation. Real is double or
// Lanes<double>.
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

// n, the divisor of the variance.
HE_INLINE double simam_divisor(int64_t positions) { return double(std::max<int64_t>(positions - 1, 1)); }

template <typename T, typename S>
struct SimamGate {
  S mean;
  S energy_scale;    // 1 / (4 (v + lam))
  S exponent_scale;  // -energy_scale * log2(e)

  static HE_INLINE SimamGate make(S mean, S variance, double lam) {
    const S energy_scale = 1 / (4 * (variance + T(lam)));
    return {mean, energy_scale, energy_scale * T(-1.4426950408889634)};
  }

  // (1 - g) / g = e^-energy, where g is the gate and d = x - mean.
  HE_INLINE Lanes<T> inverse_odds(Lanes<T> d) const {
    return exp2_nonpositive(d * d * exponent_scale - T(0.5 * 1.4426950408889634));
  }

  HE_INLINE Lanes<T> forward(Lanes<T> x) const { return x / (1 + inverse_odds(x - mean)); }

  // Returns the terms of the gradient that do not depend on sums over the plane: grad_y * g + s, where s is the
  // gradient through d. The terms through mean and variance need the sums of s and of s * d. Adds this vector's s and
  // s * d to sum_s and sum_sd.
  HE_INLINE Lanes<T> backward(Lanes<T> grad_y, Lanes<T> x, Lanes<T>& sum_s, Lanes<T>& sum_sd) const {
    const Lanes<T> d = x - mean;
    const Lanes<T> w = inverse_odds(d);
    const Lanes<T> g = 1 / (1 + w);
    const Lanes<T> grad = grad_y * g;
    const Lanes<T> s = grad * (x * (w * g)) * (d * (2 * energy_scale));
    sum_s += s;
    sum_sd += s * d;
    return grad + s;
  }

  // The other terms are -mean_s and -(x - mean) * slope. mean_s() and slope() compute mean_s and slope from the
  // plane's sums of s and s * d. finish() adds the terms to `direct`, the result of backward().
  HE_INLINE S mean_s(S sum_s, int64_t positions) const { return sum_s / T(positions); }
  HE_INLINE S slope(S sum_sd, double n) const { return sum_sd * (4 / T(n) * energy_scale); }
  HE_INLINE Lanes<T> finish(Lanes<T> direct, Lanes<T> x, S mean_s, S slope) const {
    return direct - mean_s - (x - mean) * slope;
  }
};

}  // namespace hashengine
