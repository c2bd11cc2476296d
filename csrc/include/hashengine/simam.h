// simam: y = x * sigmoid((x - m)^2 / (4 (v + lam)) + 1/2), with m and v the mean and the variance of x's channel plane.
//   Yang, Zhang, Li, Xie: "SimAM", ICML 2021 (equation 5); v = sum((x - m)^2) / n with n = max(H * W - 1, 1).
#pragma once

#include "hashengine/parallel.h"
#include "hashengine/simd_level.h"
#include "hashengine/types.h"

namespace hashengine {

// A batch of feature maps, N * C planes of H * W = `positions` values.
struct SimamShape {
  int64_t samples;
  int64_t channels;
  int64_t positions;
  FeatureLayout layout;
  Dtype dtype;
};

// x, y: laid out as the shape says. stats: [samples, channels, 2], mean and variance; double for float64, else float.
struct SimamForward {
  const void* x;
  void* y;
  void* stats;
  SimamShape shape;
  double lam;
};

// grad_y, x, grad_x: laid out alike. stats: from the forward.
struct SimamBackward {
  const void* grad_y;
  const void* x;
  const void* stats;
  void* grad_x;
  SimamShape shape;
  double lam;
};

void simam_forward_cpu(const SimamForward& params, SimdLevel level, const ThreadPool& pool);
void simam_backward_cpu(const SimamBackward& params, SimdLevel level, const ThreadPool& pool);

// Bytes of scratch that the launchers need on the device, 0 where a plane stays on chip; it need not be cleared.
int64_t simam_forward_workspace_bytes(const SimamShape& shape);
int64_t simam_backward_workspace_bytes(const SimamShape& shape);
void launch_simam_forward(const SimamForward& params, void* workspace, cudaStream_t stream);
void launch_simam_backward(const SimamBackward& params, void* workspace, cudaStream_t stream);

// The formulas of one plane, for host and device. T is float, or double for float64.
//
// With d = x - m, e = d^2 / (4 (v + lam)) + 1/2 and g = sigmoid(e), the gradient of a plane is
//   dx = dy g + s - mean(s) - d * sum(q) / (2 n (v + lam)^2),   q = dy x g (1 - g) d^2,   s = dy x g (1 - g) d / (2 (v
//   + lam)):
// through x itself, through d directly, through m, and through v (where sum(d) = 0 leaves no term through m).
template <typename T>
struct SimamPlane {
  T mean;
  T energy_scale;  // 1 / (4 (v + lam))
};

template <typename T>
HE_HOST_DEVICE SimamPlane<T> simam_plane(T mean, T variance, double lam) {
  return {mean, T(1) / (T(4) * (variance + T(lam)))};
}

}  // namespace hashengine
