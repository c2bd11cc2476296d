// simam: y = x * sigmoid((x - m)^2 / (4 (v + lam)) + 1/2), where m and v are the mean and the variance of the plane
// (one channel of one sample) that contains x.
//   Yang, Zhang, Li, Xie: "SimAM", ICML 2021 (equation 5); v = sum((x - m)^2) / n with n = max(H * W - 1, 1).
#pragma once

#include "hashengine/parallel.h"
#include "hashengine/simd_level.h"
#include "hashengine/types.h"

namespace hashengine {

// A batch of feature maps: samples * channels planes, each of H * W = `positions` values.
struct SimamShape {
  int64_t samples;
  int64_t channels;
  int64_t positions;
  FeatureLayout layout;
  Dtype dtype;
};

// x, y: feature maps in the layout shape.layout. stats: [samples, channels, 2], the mean and the variance of each
// plane, of type double if shape.dtype is kFloat64, otherwise of type float.
struct SimamForward {
  const void* x;
  void* y;
  void* stats;
  SimamShape shape;
  double lam;
};

// grad_y, x, grad_x: feature maps in the layout shape.layout. stats: the array that the forward wrote.
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

// Bytes of scratch memory that the launchers need on the current device; 0 if each plane stays on chip. The memory may
// be uninitialized.
int64_t simam_forward_workspace_bytes(const SimamShape& shape);
int64_t simam_backward_workspace_bytes(const SimamShape& shape);
void launch_simam_forward(const SimamForward& params, void* workspace, cudaStream_t stream);
void launch_simam_backward(const SimamBackward& params, void* workspace, cudaStream_t stream);

// The gradient of a plane. With d = x - m, e = d^2 / (4 (v + lam)) + 1/2 and g = sigmoid(e), it is
//   dx = dy * g + s - mean(s) - d * sum(q) / (2 n (v + lam)^2),
//   s = dy * x * g * (1 - g) * d / (2 (v + lam)),   q = dy * x * g * (1 - g) * d^2.
// The four terms of dx are the gradients through x itself, through d, through m, and through v. (There is no gradient
// through v and then m, because sum(d) = 0.)

}  // namespace hashengine
