// What the SimAM kernels have in common: the vectors that a thread holds, and the steps of the formulas over them.
#pragma once

#include "fast_math.cuh"
#include "simam_launch.h"
#include "vec.cuh"

namespace hashengine {

// What all planes share.
template <typename Real>
struct SimamTerms {
  Real inverse_positions;  // 1 / (H * W)
  Real inverse_freedom;    // 1 / n
  double lam;

  SimamTerms(const SimamShape& shape, double lam)
      : inverse_positions(static_cast<Real>(1.0 / static_cast<double>(shape.positions))),
        inverse_freedom(static_cast<Real>(1.0 / static_cast<double>(shape.positions > 1 ? shape.positions - 1 : 1))),
        lam(lam) {}
};

// The sigmoid of the energy d^2 * energy_scale + 1/2, and one minus it without cancellation.
template <typename Real>
struct SimamGate {
  Real value, complement;
};

// The energy is at least 1/2, so that power is in [0, 0.61]: nothing overflows, and value = 1 / (1 + power) feels less
// than half of power's relative error.
__device__ __forceinline__ SimamGate<float> simam_gate(float d, float energy_scale) {
  constexpr float kLog2OfE = 1.44269504f;
  const float power = fast_exp2(d * d * (-kLog2OfE * energy_scale) - kLog2OfE / 2);  // e^-energy
  const float value = fast_reciprocal(1 + power);
  return {value, power * value};
}
__device__ __forceinline__ SimamGate<double> simam_gate(double d, double energy_scale) {
  const double power = exp(d * d * -energy_scale - 0.5);
  const double value = 1 / (1 + power);
  return {value, power * value};
}

// Where a thread's vectors begin, how far they lie apart, in elements, and how many it has.
struct HeldPlace {
  int64_t begin;
  int64_t stride;
  int count;
};

// Elements of a 16-byte vector. float64 goes one by one: it is for checking gradients, not for speed.
template <typename T>
constexpr int kFullWidth = sizeof(T) == 8 ? 1 : kVectorBytes / sizeof(T);

// The vectors that a thread holds, of 16 bytes, or of one element where planes or pointers are not aligned to that. In
// NCHW all its elements belong to one channel; in NHWC element i of every vector belongs to channel i of the vector's.
// So what belongs to a channel is an array of kChannels, and element i finds its own at i % kChannels.
template <typename Element, int kVectorWidth, FeatureLayout kFeatureLayout>
struct Held {
  using T = Element;
  using Real = Arithmetic<T>;
  static constexpr int kWidth = kVectorWidth;
  static constexpr FeatureLayout kLayout = kFeatureLayout;
  static constexpr int kVectors = simam_held_vectors(kWidth, sizeof(T));
  static constexpr int kChannels = kLayout == FeatureLayout::kContiguous ? 1 : kWidth;
  using Vectors = Vector<T, kWidth>[kVectors];
  using Reals = Vector<Real, kWidth>[kVectors];
  using Plane = SimamPlane<Real>;

  static __device__ __forceinline__ void load(const void* array, const HeldPlace& place, Vectors& vectors) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)  // every load is under way before the first is used
      if (v < place.count) vectors[v] = vector_at<kWidth>(static_cast<const T*>(array), place.begin + v * place.stride);
  }

  // Calls body(v, i, c) for every element that the thread has.
  template <typename Body>
  static __device__ __forceinline__ void for_each(const HeldPlace& place, Body body) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v >= place.count) break;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) body(v, i, i % kChannels);
    }
  }

  // Stores body(v, i, c) for every element that the thread has.
  template <typename Body>
  static __device__ __forceinline__ void store_each(void* array, const HeldPlace& place, Body body) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v >= place.count) break;
      Vector<T, kWidth> result;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) result.at[i] = narrow<T>(body(v, i, i % kChannels));
      vector_at<kWidth>(static_cast<T*>(array), place.begin + v * place.stride) = result;
    }
  }

  // --- forward: the sum, moments around the mean that it gave, then y ---

  static __device__ __forceinline__ void sum(const Vectors& x, const HeldPlace& place, Real (&sums)[kChannels]) {
    for_each(place, [&](int v, int i, int c) { sums[c] += widen_at(x[v], i); });
  }

  // A mean far above the deviations leaves its rounding in every difference. Where elements are wide enough for that to
  // show, the differences are added up as well, and what they fail to cancel corrects the mean.
  static constexpr bool kCorrects = sizeof(T) >= sizeof(float);
  static constexpr int kMoments = kCorrects ? 2 * kChannels : kChannels;

  static __device__ __forceinline__ void sum_moments(const Vectors& x, const HeldPlace& place,
                                                     const Real (&means)[kChannels], Real (&sums)[kMoments]) {
    for_each(place, [&](int v, int i, int c) {
      const Real d = widen_at(x[v], i) - means[c];
      sums[c] += d * d;
      if constexpr (kCorrects) sums[kChannels + c] += d;
    });
  }

  // pairs: the mean and the sum of squares around it.
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

  static __device__ __forceinline__ void store_gated(const Vectors& x, const HeldPlace& place,
                                                     const Plane (&planes)[kChannels], void* y) {
    store_each(y, place, [&](int v, int i, int c) {
      const Real value = widen_at(x[v], i);
      return value * simam_gate(value - planes[c].mean, planes[c].energy_scale).value;
    });
  }

  // --- backward: dx = t - sum(s) / M - d * sum(s d) / (n (v + lam)) with t = dy g + s; s as in simam.h ---

  struct Slope {
    Real d, s, t;

    __device__ __forceinline__ Slope(Real x, Real grad_y, const Plane& plane) : d(x - plane.mean) {
      const SimamGate<Real> gate = simam_gate(d, plane.energy_scale);
      const Real gated = grad_y * gate.value;
      s = gated * (x * gate.complement) * (d * (2 * plane.energy_scale));
      t = gated + s;
    }
  };

  // What the gradients of a plane owe to its mean and to its variance.
  struct Shares {
    Real of_mean, of_variance;

    __device__ __forceinline__ Shares(Real sum_s, Real sum_sd, const Plane& plane, const SimamTerms<Real>& terms)
        : of_mean(sum_s * terms.inverse_positions),
          of_variance(sum_sd * terms.inverse_freedom * (4 * plane.energy_scale)) {}
    __device__ __forceinline__ Real gradient(Real t, Real d) const { return t - of_mean - d * of_variance; }
  };

  // sums: a pair a channel, of s and of s d. t is what has to be kept of grad_y.
  static __device__ __forceinline__ void sum_slopes(const Vectors& x, const Vectors& grad_y, const HeldPlace& place,
                                                    const Plane (&planes)[kChannels], Real (&sums)[2 * kChannels],
                                                    Reals& t) {
    for_each(place, [&](int v, int i, int c) {
      const Slope slope(widen_at(x[v], i), widen_at(grad_y[v], i), planes[c]);
      sums[2 * c] += slope.s;
      sums[2 * c + 1] += slope.s * slope.d;
      t[v].at[i] = slope.t;
    });
  }

  static __device__ __forceinline__ void store_gradient(const Vectors& x, const Reals& t, const HeldPlace& place,
                                                        const Plane (&planes)[kChannels],
                                                        const Real (&sums)[2 * kChannels],
                                                        const SimamTerms<Real>& terms, void* grad_x) {
    store_each(grad_x, place, [&](int v, int i, int c) {
      const Shares shares(sums[2 * c], sums[2 * c + 1], planes[c], terms);
      return shares.gradient(t[v].at[i], widen_at(x[v], i) - planes[c].mean);
    });
  }

  // With s and t made anew: where grad_y was read again.
  static __device__ __forceinline__ void store_gradient_anew(const Vectors& x, const Vectors& grad_y,
                                                             const HeldPlace& place, const Plane (&planes)[kChannels],
                                                             const Real (&sums)[2 * kChannels],
                                                             const SimamTerms<Real>& terms, void* grad_x) {
    store_each(grad_x, place, [&](int v, int i, int c) {
      const Shares shares(sums[2 * c], sums[2 * c + 1], planes[c], terms);
      const Slope slope(widen_at(x[v], i), widen_at(grad_y[v], i), planes[c]);
      return shares.gradient(slope.t, slope.d);
    });
  }

  // --- pairs in memory, [channels, 2]: mean and variance, or the sums of s and of s d ---

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

  static __device__ __forceinline__ void load_planes(const void* stats, int64_t channel, double lam,
                                                     Plane (&planes)[kChannels]) {
    Real pairs[2 * kChannels];
    load_pairs(stats, channel, pairs);
    make_planes(pairs, lam, planes);
  }

  static __device__ __forceinline__ void make_planes(const Real (&stats)[2 * kChannels], double lam,
                                                     Plane (&planes)[kChannels]) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) planes[c] = simam_plane(stats[2 * c], stats[2 * c + 1], lam);
  }
};

}  // namespace hashengine
