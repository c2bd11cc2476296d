#include "hashengine/triplet_gate.h"
#include "hashengine/triplet_pool.h"
#include "triplet_workspace.h"

using namespace hashengine;

namespace {

TripletShape shape_of(const int64_t* shape) {
  return {shape[0],       shape[1], shape[2], shape[3], int(shape[4]), int(shape[5]), FeatureLayout(shape[6]),
          Dtype(shape[7])};
}

}  // namespace

extern "C" {

// shape: N, C, H, W, branches, kernel_size, layout, dtype. Maps, gradients and indices: a pointer a branch.
int64_t workspace_bytes_of_triplet_pool_forward(const int64_t* shape) {
  return triplet_pool_forward_workspace_bytes(shape_of(shape));
}
int64_t workspace_bytes_of_triplet_gate_backward(const int64_t* shape) {
  return triplet_gate_backward_workspace_bytes(shape_of(shape));
}

void triplet_pool_forward(const int64_t* shape, const void* x, void* const* pools, int32_t* const* indices,
                          void* workspace) {
  TripletPoolForward params{x, {}, {}, shape_of(shape)};
  for (int b = 0; b < kTripletBranches; ++b) params.pool[b] = pools[b], params.index[b] = indices[b];
  launch_triplet_pool_forward(params, workspace, nullptr);
}

void triplet_pool_backward(const int64_t* shape, const void* const* grad_pools, const int32_t* const* indices,
                           void* grad_x) {
  TripletPoolBackward params{{}, {}, grad_x, shape_of(shape)};
  for (int b = 0; b < kTripletBranches; ++b) params.grad_pool[b] = grad_pools[b], params.index[b] = indices[b];
  launch_triplet_pool_backward(params, nullptr);
}

void triplet_gate_forward(const int64_t* shape, const void* x, const void* const* maps, void* y) {
  TripletGateForward params{x, {}, y, shape_of(shape)};
  for (int b = 0; b < params.shape.branches; ++b) params.map[b] = maps[b];
  launch_triplet_gate_forward(params, nullptr);
}

void triplet_gate_backward(const int64_t* shape, const void* grad_y, const void* x, const void* const* maps,
                           void* grad_x, void* const* grad_maps, void* workspace) {
  TripletGateBackward params{grad_y, x, {}, grad_x, {}, shape_of(shape)};
  for (int b = 0; b < params.shape.branches; ++b) params.map[b] = maps[b], params.grad_map[b] = grad_maps[b];
  launch_triplet_gate_backward(params, workspace, nullptr);
}

// The pass over x alone: the partial maps of float16, maximum and sum, one axis after another.
void triplet_pool_pass(const int64_t* shape, const void* x, void* maps) {
  const TripletGeometry geometry = TripletGeometry::of(shape_of(shape));
  const TripletCut cut = TripletCut::to_reduce(geometry, triplet_vector_width(geometry, Dtype::kFloat16));
  Arena arena(maps);
  launch_triplet_pool(x, Dtype::kFloat16, geometry, cut, partial_maps<float>(geometry, cut.tiling, 2, arena), nullptr);
}

}  // extern "C"
