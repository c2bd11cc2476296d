// greedy_sign: b = +1 if u >= 0, otherwise -1; penalty = alpha * mean(||u| - 1|^3). The backward computes the gradients
// through both outputs in one pass.
//   Su, Zhang, Han, Tian: "Greedy Hash", NeurIPS 2018; the cubic penalty is their equation 6 with p = 3.
#pragma once

#include <cmath>

#include "hashengine/parallel.h"
#include "hashengine/simd_level.h"
#include "hashengine/types.h"

namespace hashengine {

// u, b: [numel], the same dtype. penalty: one double for float64, otherwise one float.
struct GreedySignForward {
  const void* u;
  void* b;
  void* penalty;
  int64_t numel;
  double alpha;
  Dtype dtype;
};

// grad_b, u, grad_u: [numel], the same dtype. grad_penalty: one double for float64, otherwise one float. The gradient
// of an unused output (grad_b or grad_penalty) may be null; it counts as zero.
struct GreedySignBackward {
  const void* grad_b;
  const void* grad_penalty;
  const void* u;
  void* grad_u;
  int64_t numel;
  double alpha;
  Dtype dtype;
};

// Returns false if u contains a NaN, which has no sign.
bool greedy_sign_forward_cpu(const GreedySignForward& params, SimdLevel level, const ThreadPool& pool);
void greedy_sign_backward_cpu(const GreedySignBackward& params, SimdLevel level, const ThreadPool& pool);

// Bytes of scratch memory that launch_greedy_sign_forward needs on the current device. The memory may be uninitialized.
int64_t greedy_sign_workspace_bytes(int64_t numel);
void launch_greedy_sign_forward(const GreedySignForward& params, void* workspace, cudaStream_t stream);
void launch_greedy_sign_backward(const GreedySignBackward& params, cudaStream_t stream);

// The formulas, for host and device code. T is double for float64, otherwise float.

template <typename T>
HE_HOST_DEVICE T greedy_sign_code(T u) {
  return u >= T(0) ? T(1) : T(-1);
}

template <typename T>
HE_HOST_DEVICE T greedy_sign_penalty(T u) {
  const T distance = std::fabs(std::fabs(u) - T(1));
  return distance * distance * distance;
}

// The derivative of the penalty with respect to u, without the factor alpha * 3 / numel. sign(0) counts as 0, both for
// u and for |u| - 1. A NaN gives NaN.
template <typename T>
HE_HOST_DEVICE T greedy_sign_penalty_slope(T u) {
  const T excess = std::fabs(u) - T(1);
  const T slope = excess * std::fabs(excess);  // (|u| - 1)^2 * sign(|u| - 1)
  return u > T(0) ? slope : (u < T(0) ? -slope : u * slope);
}

}  // namespace hashengine
