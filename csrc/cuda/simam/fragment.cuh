// The fragment of a SimAM kernel's thread, that is, the elements that the thread holds in registers, and the steps of
// the formulas that process it.
#pragma once

#include "cuda/common/fast_math.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/simam/plan.h"

namespace hashengine::simam {

// The constants that are the same for all planes.
template <typename Real>
struct Constants {
  Real positions;          // H * W
  Real inverse_positions;  // 1 / (H * W)
  Real inverse_freedom;    // 1 / n, see simam.h
  Real lam;

  Constants(const SimamShape& shape, double lambda)
      : positions(static_cast<Real>(shape.positions)),
        inverse_positions(static_cast<Real>(1.0 / static_cast<double>(shape.positions))),
        inverse_freedom(static_cast<Real>(1.0 / static_cast<double>(shape.positions > 1 ? shape.positions - 1 : 1))),
        lam(static_cast<Real>(lambda)) {}
};

// What the gate of a plane depends on; simam.h has the formulas.
template <typename Real>
struct SimamPlane {
  Real mean;
  Real energy_scale;  // 1 / (4 (v + lam))
};

// sum / count, given 1 / count. The correction makes the mean of equal values exact where their sum is, as in half
// precision. Otherwise a plane of equal values would have a variance, and with a tiny lam another gate than sigmoid(1 /
// 2).
template <typename Real>
__device__ __forceinline__ Real mean_of(Real sum, Real count, Real inverse_count) {
  const Real mean = sum * inverse_count;
  return fma(fma(-mean, count, sum), inverse_count, mean);
}

// The gate: value = sigmoid(energy) with energy = d^2 * energy_scale + 1/2, and complement = 1 - value, computed
// without cancellation.
template <typename Real>
struct Gate {
  Real value, complement;
};

// power = e^-energy is in [0, 0.61], because the energy is at least 1/2. Therefore nothing overflows, and the relative
// error of value = 1 / (1 + power) is less than half of that of power.
__device__ __forceinline__ Gate<float> gate_of(float d, float energy_scale) {
  constexpr float kLog2OfE = 1.44269504f;
  const float power = fast_exp2(d * d * (-kLog2OfE * energy_scale) - kLog2OfE / 2);
  const float value = fast_reciprocal(1 + power);
  return {value, power * value};
}
__device__ __forceinline__ Gate<double> gate_of(double d, double energy_scale) {
  const double power = exp(d * d * -energy_scale - 0.5);
  const double value = 1 / (1 + power);
  return {value, power * value};
}

__device__ __forceinline__ float reciprocal(float x) { return fast_reciprocal(x); }
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

// The place of a thread's vectors: the offset of the first, the distance between them (both in elements), and their
// number.
struct FragmentPlace {
  int64_t begin;
  int64_t stride;
  int count;
};

// The number of elements of a 16-byte vector. float64 is for gradient checks, not for speed, so its vectors have one
// element.
template <typename T>
constexpr int kFullWidth = sizeof(T) == 8 ? 1 : kVectorBytes / sizeof(T);

// A vector has 16 bytes, or a single element. It has a single element for float64, and if planes or arrays are not
// aligned to 16 bytes. In NCHW all elements of a thread belong to one channel. In NHWC element i of every vector
// belongs to the thread's channel i. Values per channel are therefore arrays of kChannels values, and element i uses
// the value i % kChannels.
template <typename Element, int kVectorWidth, FeatureLayout kFeatureLayout>
struct Fragment {
  using T = Element;
  using Real = Arithmetic<T>;
  static constexpr int kWidth = kVectorWidth;
  static constexpr FeatureLayout kLayout = kFeatureLayout;
  static constexpr int kVectors = fragment_vectors(kWidth, sizeof(T));
  static constexpr int kChannels = kLayout == FeatureLayout::kContiguous ? 1 : kWidth;
  using Vectors = Vector<T, kWidth>[kVectors];
  using Reals = Vector<Real, kWidth>[kVectors];
  using Plane = SimamPlane<Real>;
  // A thread can have fewer than kVectors vectors. If kIsMasked, it computes with kVectors vectors all the same, and
  // the missing ones add nothing to the sums and are not stored. Otherwise it branches after each vector, which costs
  // more than the work on a vector of a single element.
  static constexpr bool kIsMasked = kWidth == 1 && sizeof(T) < sizeof(double);

  static __device__ __forceinline__ void load(const void* array, const FragmentPlace& place, Vectors& vectors) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {  // issues all loads before the first use
      if (v < place.count) {
        vectors[v] = vector_at<kWidth>(static_cast<const T*>(array), place.begin + v * place.stride);
      } else if (kIsMasked) {
        vectors[v] = {};
      }
    }
  }

  // Calls body(vector, element, channel, is_missing) for every element of the thread. If kIsMasked, it also calls body
  // for the elements of missing vectors, which are zero.
  template <typename Body>
  static __device__ __forceinline__ void for_each(const FragmentPlace& place, Body body) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!kIsMasked && v >= place.count) break;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) body(v, i, i % kChannels, kIsMasked && v >= place.count);
    }
  }

  // Stores body(vector, element, channel) for every element of the thread.
  template <typename Body>
  static __device__ __forceinline__ void store_each(void* array, const FragmentPlace& place, Body body) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!kIsMasked && v >= place.count) break;
      Vector<T, kWidth> result;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) result.at[i] = narrow<T>(body(v, i, i % kChannels));
      if (v < place.count) vector_at<kWidth>(static_cast<T*>(array), place.begin + v * place.stride) = result;
    }
  }

  // --- forward: the sum, the moments around the mean, then y ---

  static __device__ __forceinline__ void sum(const Vectors& x, const FragmentPlace& place, Real (&sums)[kChannels]) {
    for_each(place, [&](int v, int i, int c, bool) { sums[c] += widen_at(x[v], i); });
  }

  // If the mean is much larger than the deviations, the rounding error of the mean affects every difference x - mean.
  // Element types of 32 bits or more are precise enough to show this error. For these types, sum_moments() also sums
  // the differences. For the exact mean their sum would be zero, so correct() adds their mean to the mean of x.
  static constexpr bool kCorrects = sizeof(T) >= sizeof(float);
  static constexpr int kMoments = kCorrects ? 2 * kChannels : kChannels;

  static __device__ __forceinline__ void sum_moments(const Vectors& x, const FragmentPlace& place,
                                                     const Real (&means)[kChannels], Real (&sums)[kMoments]) {
    for_each(place, [&](int v, int i, int c, bool is_missing) {
      const Real d = is_missing ? Real(0) : widen_at(x[v], i) - means[c];
      sums[c] += d * d;
      if constexpr (kCorrects) sums[kChannels + c] += d;
    });
  }

  // Writes to `pairs`, per channel, the corrected mean and the sum of squared deviations from it.
  static __device__ __forceinline__ void correct(const Real (&means)[kChannels], const Real (&sums)[kMoments],
                                                 Real inverse_count, Real (&pairs)[2 * kChannels]) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      pairs[2 * c] = means[c];
      pairs[2 * c + 1] = sums[c];
      if constexpr (kCorrects) {
        const Real error = sums[kChannels + c] * inverse_count;
        pairs[2 * c] += error;
        pairs[2 * c + 1] -= error * sums[kChannels + c];
      }
    }
  }

  static __device__ __forceinline__ void store_gated(const Vectors& x, const FragmentPlace& place,
                                                     const Plane (&planes)[kChannels], void* y) {
    store_each(y, place, [&](int v, int i, int c) {
      const Real value = widen_at(x[v], i);
      return value * gate_of(value - planes[c].mean, planes[c].energy_scale).value;
    });
  }

  // --- backward ---
  //
  // dx = t - sum(s) / M - d * sum(s * d) / (n (v + lam)), with M = H * W, t = dy * g + s, and s, n, v as in simam.h.

  struct Slope {
    Real d, s, t;

    __device__ __forceinline__ Slope(Real x, Real grad_y, const Plane& plane) : d(x - plane.mean) {
      const Gate<Real> gate = gate_of(d, plane.energy_scale);
      const Real gated = grad_y * gate.value;
      s = gated * (x * gate.complement) * (d * (2 * plane.energy_scale));
      t = gated + s;
    }
  };

  // The parts of a plane's gradient that come from its mean and from its variance: the same for all elements, except
  // that the second is multiplied by d.
  struct PlaneGradient {
    Real from_mean, from_variance;

    __device__ __forceinline__ PlaneGradient(Real sum_s, Real sum_sd, const Plane& plane,
                                             const Constants<Real>& constants)
        : from_mean(sum_s * constants.inverse_positions),
          from_variance(sum_sd * constants.inverse_freedom * (4 * plane.energy_scale)) {}
    __device__ __forceinline__ Real gradient(Real t, Real d) const { return t - from_mean - d * from_variance; }
  };

  // Adds, per channel, the sums of s and of s * d to `sums`, and writes t, which store_gradient() takes instead of
  // grad_y.
  static __device__ __forceinline__ void sum_slopes(const Vectors& x, const Vectors& grad_y, const FragmentPlace& place,
                                                    const Plane (&planes)[kChannels], Real (&sums)[2 * kChannels],
                                                    Reals& t) {
    for_each(place, [&](int v, int i, int c, bool is_missing) {
      const Real value = is_missing ? planes[c].mean : widen_at(x[v], i);  // d and s become zero
      const Slope slope(value, widen_at(grad_y[v], i), planes[c]);
      sums[2 * c] += slope.s;
      sums[2 * c + 1] += slope.s * slope.d;
      t[v].at[i] = slope.t;
    });
  }

  static __device__ __forceinline__ void store_gradient(const Vectors& x, const Reals& t, const FragmentPlace& place,
                                                        const Plane (&planes)[kChannels],
                                                        const Real (&sums)[2 * kChannels],
                                                        const Constants<Real>& constants, void* grad_x) {
    store_each(grad_x, place, [&](int v, int i, int c) {
      const PlaneGradient plane_gradient(sums[2 * c], sums[2 * c + 1], planes[c], constants);
      return plane_gradient.gradient(t[v].at[i], widen_at(x[v], i) - planes[c].mean);
    });
  }

  // Like store_gradient(), but computes s and t again from grad_y.
  static __device__ __forceinline__ void store_gradient_recomputed(const Vectors& x, const Vectors& grad_y,
                                                                   const FragmentPlace& place,
                                                                   const Plane (&planes)[kChannels],
                                                                   const Real (&sums)[2 * kChannels],
                                                                   const Constants<Real>& constants, void* grad_x) {
    store_each(grad_x, place, [&](int v, int i, int c) {
      const PlaneGradient plane_gradient(sums[2 * c], sums[2 * c + 1], planes[c], constants);
      const Slope slope(widen_at(x[v], i), widen_at(grad_y[v], i), planes[c]);
      return plane_gradient.gradient(slope.t, slope.d);
    });
  }

  // --- pairs in memory, [channels, 2]: mean and variance, or the sums of s and of s * d ---

  static __device__ __forceinline__ void load_pairs(const void* array, int64_t channel, Real (&pairs)[2 * kChannels]) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const auto& pair = vector_at<2>(static_cast<const Real*>(array), 2 * (channel + c));
      pairs[2 * c] = pair.at[0];
      pairs[2 * c + 1] = pair.at[1];
    }
  }

  static __device__ __forceinline__ void store_pairs(void* array, int64_t channel, const Real (&pairs)[2 * kChannels]) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      vector_at<2>(static_cast<Real*>(array), 2 * (channel + c)) = {pairs[2 * c], pairs[2 * c + 1]};
  }

  static __device__ __forceinline__ void load_planes(const void* stats, int64_t channel, Real lam,
                                                     Plane (&planes)[kChannels]) {
    Real pairs[2 * kChannels];
    load_pairs(stats, channel, pairs);
    make_planes(pairs, lam, planes);
  }

  static __device__ __forceinline__ void make_planes(const Real (&stats)[2 * kChannels], Real lam,
                                                     Plane (&planes)[kChannels]) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) planes[c] = {stats[2 * c], reciprocal(4 * (stats[2 * c + 1] + lam))};
  }
};

}  // namespace hashengine::simam
