// triplet_gate: y = x * mean over the branches of sigmoid(map), each map spread along the axis that it lacks.
//   Misra, Nalamada, Arasanipalai, Hou: "Rotate to Attend", WACV 2021 (equation 2, after convolution and BatchNorm).
#pragma once

#include "hashengine/triplet_attention.h"

namespace hashengine {

// A branch's map: [N, rows, columns], Real. shape.kernel_size is not used.
struct TripletGateForward {
  const void* x;
  const void* map[kTripletBranches];
  void* y;
  TripletShape shape;
};

struct TripletGateBackward {
  const void* grad_y;
  const void* x;
  const void* map[kTripletBranches];
  void* grad_x;
  void* grad_map[kTripletBranches];
  TripletShape shape;
};

void triplet_gate_forward_cpu(const TripletGateForward& params, SimdLevel level, const ThreadPool& pool);
void triplet_gate_backward_cpu(const TripletGateBackward& params, SimdLevel level, const ThreadPool& pool);

// Bytes of scratch that a launcher needs on the device; it need not be cleared.
int64_t triplet_gate_backward_workspace_bytes(const TripletShape& shape);
void launch_triplet_gate_forward(const TripletGateForward& params, cudaStream_t stream);
void launch_triplet_gate_backward(const TripletGateBackward& params, void* workspace, cudaStream_t stream);

}  // namespace hashengine
