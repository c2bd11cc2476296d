#include "hashengine/triplet_gate.h"
#include "triplet_shape.h"

using namespace hashengine;

extern "C" {

// shape: see triplet_shape.h. maps, grad_maps: one pointer per branch.
int64_t workspace_bytes_of_triplet_gate_backward(const int64_t* shape) {
  return triplet_gate_backward_workspace_bytes(triplet_shape(shape));
}

void triplet_gate_forward(const int64_t* shape, const void* x, const void* const* maps, void* y) {
  TripletGateForward params{x, {}, y, triplet_shape(shape)};
  for (int b = 0; b < params.shape.branches; ++b) params.map[b] = maps[b];
  launch_triplet_gate_forward(params, nullptr);
}

void triplet_gate_backward(const int64_t* shape, const void* grad_y, const void* x, const void* const* maps,
                           void* grad_x, void* const* grad_maps, void* workspace) {
  TripletGateBackward params{grad_y, x, {}, grad_x, {}, triplet_shape(shape)};
  for (int b = 0; b < params.shape.branches; ++b) params.map[b] = maps[b], params.grad_map[b] = grad_maps[b];
  launch_triplet_gate_backward(params, workspace, nullptr);
}

}  // extern "C"
