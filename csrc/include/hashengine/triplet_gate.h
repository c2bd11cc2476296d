// triplet_gate: y = x * mean over the branches of sigmoid(map), where each map is broadcast along its pooled axis.
//   Misra, Nalamada, Arasanipalai, Hou: "Rotate to Attend", WACV 2021 (equation 2, after convolution and BatchNorm).
#pragma once

#include "hashengine/triplet_attention.h"

namespace hashengine {

// map: [N, rows, columns] of type Real (triplet_attention.h) for each branch. shape.kernel_size is ignored.
struct TripletGateForward {
  const void* x;
  const void* map[kTripletBranches];
  void* y;
  TripletShape shape;
};

// map and grad_map: like the maps of TripletGateForward.
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

// Bytes of scratch memory that launch_triplet_gate_backward needs on the current device. The memory may be
// uninitialized.
int64_t triplet_gate_backward_workspace_bytes(const TripletShape& shape);
void launch_triplet_gate_forward(const TripletGateForward& params, cudaStream_t stream);
void launch_triplet_gate_backward(const TripletGateBackward& params, void* workspace, cudaStream_t stream);

}  // namespace hashengine
