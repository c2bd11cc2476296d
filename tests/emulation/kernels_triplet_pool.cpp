#include "cuda/triplet/passes.h"
#include "hashengine/triplet_pool.h"
#include "triplet_shape.h"

using namespace hashengine;

extern "C" {

// shape: see triplet_shape.h. pools, indices: one pointer per branch.
int64_t workspace_bytes_of_triplet_pool_forward(const int64_t* shape) {
  return triplet_pool_forward_workspace_bytes(triplet_shape(shape));
}

void triplet_pool_forward(const int64_t* shape, const void* x, void* const* pools, int32_t* const* indices,
                          void* workspace) {
  TripletPoolForward params{x, {}, {}, triplet_shape(shape)};
  for (int b = 0; b < kTripletBranches; ++b) params.pool[b] = pools[b], params.index[b] = indices[b];
  launch_triplet_pool_forward(params, workspace, nullptr);
}

void triplet_pool_backward(const int64_t* shape, const void* const* grad_pools, const int32_t* const* indices,
                           void* grad_x) {
  TripletPoolBackward params{{}, {}, grad_x, triplet_shape(shape)};
  for (int b = 0; b < kTripletBranches; ++b) params.grad_pool[b] = grad_pools[b], params.index[b] = indices[b];
  launch_triplet_pool_backward(params, nullptr);
}

// Runs only the reduce pass, on float16. maps: the partial maps of the three axes, one after another; each has the
// maximum and the sum.
void triplet_reduce_pool(const int64_t* shape, const void* x, void* maps) {
  const triplet::Geometry geometry = triplet::Geometry::from_shape(triplet_shape(shape));
  const int width = triplet::widest_vector(geometry, Dtype::kFloat16);
  const triplet::PassPlan plan = triplet::PassPlan::for_reduce<float>(geometry, width);
  Workspace workspace(maps);
  const auto partial_maps = triplet::partial_maps<float>(geometry, plan.tiling, 2, workspace);
  triplet::launch_reduce_pool(x, Dtype::kFloat16, geometry, plan, partial_maps, nullptr);
}

}  // extern "C"
