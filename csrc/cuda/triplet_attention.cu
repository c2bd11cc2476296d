// Triplet attention on the GPU: which launches make it up, and their scratch.
//
// Forward, training: pool (reads x), response (maps only), gate (reads x, writes y): 3Ns, the floor while the batch's
// statistics stand between the two readings. Inference: one launch where a sample fits into a cluster's shared memory
// (triplet_resident.cu): 2Ns, the floor; else the same three with the running statistics and nothing saved.
// Backward: products (reads x and dy), three launches over the maps, gate backward (reads dy, writes dx): 4Ns, the
// floor.
//
// Saved for backward, a value of a map: maximum, mean, response and index, 16 bytes. The other maps stay in the
// workspace.

#include "triplet_resident.h"
#include "triplet_workspace.h"

namespace hashengine {
namespace {

// Everything that a forward launches, with its scratch from the arena. In inference nothing is saved.
template <typename Real>
struct Forward {
  TripletGeometry geometry;
  TripletCut pool_cut;
  TripletCut gate_cut;
  AxisMaps<Real> pooled;
  TripletResponse<Real> response{};
  GateMaps<Real> gates;

  Forward(const TripletForward& params, bool saves, int width, Arena& arena)
      : geometry(TripletGeometry::of(params.shape)),
        pool_cut(TripletCut::to_reduce(geometry, width)),
        gate_cut(TripletCut::to_apply(geometry, width)),
        pooled(partial_maps<Real>(geometry, pool_cut.tiling, 2, arena)) {
    bool is_saved[kTripletBranches] = {};
    for (int a = 0; a < 3; ++a) {
      const TripletAxis& axis = geometry.axis[a];
      pooled.axis[a].scale = Real(1) / static_cast<Real>(geometry.size[a]);
      if (!params.saved.pooled || axis.branch < 0 || axis.turned || pool_cut.is_shared(a)) continue;
      is_saved[axis.branch] = true;  // the map is whole and lies as it is saved: it is written there
      pooled.axis[a].data = static_cast<Real*>(params.saved.pooled) + 2 * axis.begin;
    }
    response.maps = BranchMaps<Real>::of(geometry, params.shape, params.parameters, pooled, 2);
    for (int a = 0; a < 3; ++a) {
      const int branch = geometry.axis[a].branch;
      if (branch < 0) continue;
      BranchMap<Real>& map = response.maps.branch[branch];
      map.is_saved = is_saved[branch];
      map.shares_index = a == 0 || gate_cut.is_shared(a);
      response.running_mean[branch] = static_cast<const Real*>(params.running_mean[branch]);
      response.running_var[branch] = static_cast<const Real*>(params.running_var[branch]);
    }
    response.training = params.training;
    response.workspace = arena.take<char>(triplet_response_workspace_bytes(response.maps));
    if (saves) {
      response.pooled = static_cast<Real*>(params.saved.pooled);
      response.index = params.saved.index;
      response.response = static_cast<Real*>(params.saved.response);
      response.mean = static_cast<Real*>(params.saved.mean);
      response.var = static_cast<Real*>(params.saved.var);
    } else {
      response.response = arena.take<Real>(params.shape.maps_numel());
      response.mean = arena.take<Real>(geometry.branches);
      response.var = arena.take<Real>(geometry.branches);
    }
    gates = GateMaps<Real>::of(geometry, params.parameters, response.response, response.mean, response.var);
  }

  void launch(const TripletForward& params, cudaStream_t stream) const {
    if (geometry.samples == 0) return launch_triplet_response(response, stream);  // for the statistics in use
    launch_triplet_pool(params.x, params.shape.dtype, geometry, pool_cut, pooled, stream);
    launch_triplet_response(response, stream);
    launch_triplet_gate(params.x, params.y, gates, response.pooled, response.index, params.shape.dtype, geometry,
                        gate_cut, stream);
  }
};

int64_t forward_bytes(const TripletShape& shape, bool saves) {
  TripletForward params{};
  params.shape = shape;
  return with_real(shape.dtype, [&](auto real) {
    return most_bytes(shape, [&](int width, Arena& arena) { Forward<decltype(real)>(params, saves, width, arena); });
  });
}

void run_forward(const TripletForward& params, bool saves, void* workspace, cudaStream_t stream) {
  with_real(params.shape.dtype, [&](auto real) {
    Arena arena(workspace);
    const int width = vector_width(TripletGeometry::of(params.shape), params.shape.dtype, params.x, params.y);
    Forward<decltype(real)>(params, saves, width, arena).launch(params, stream);
  });
}

TripletForward as_forward(const TripletInference& params) {
  TripletForward forward{params.x, params.y, params.parameters, {}, {}, {}, false, params.shape};
  std::copy_n(params.running_mean, kTripletBranches, forward.running_mean);
  std::copy_n(params.running_var, kTripletBranches, forward.running_var);
  return forward;
}

// Everything that a backward launches.
template <typename Real>
struct Backward {
  TripletGeometry geometry;
  TripletCut products_cut;
  TripletCut gate_cut;
  AxisMaps<Real> products;
  TripletResponseBackward<Real> response{};
  GateMaps<Real> gates;

  Backward(const TripletBackward& params, int products_width, int gate_width, Arena& arena)
      : geometry(TripletGeometry::of(params.shape)),
        products_cut(TripletCut::to_reduce(geometry, products_width)),
        gate_cut(TripletCut::to_apply(geometry, gate_width)),
        products(partial_maps<Real>(geometry, products_cut.tiling, 1, arena)),
        gates(GateMaps<Real>::of(geometry, params.parameters, params.saved.response, params.saved.mean,
                                 params.saved.var)) {
    for (AxisMap<Real>& map : products.axis) map.scale = gates.share;
    const int64_t values = params.shape.maps_numel();
    response.maps = BranchMaps<Real>::of(geometry, params.shape, params.parameters, products, 3);
    response.pooled = static_cast<const Real*>(params.saved.pooled);
    response.response = gates.response;
    response.mean = gates.mean;
    response.var = gates.var;
    response.grad_affine = arena.take<Real>(values);
    response.grad_pooled = arena.take<Real>(2 * values);
    response.grad_conv_weight = static_cast<Real*>(params.grad_conv_weight);
    response.grad_bn_weight = static_cast<Real*>(params.grad_bn_weight);
    response.grad_bn_bias = static_cast<Real*>(params.grad_bn_bias);
    response.workspace = arena.take<char>(triplet_response_backward_workspace_bytes(response.maps));
    response.training = params.training;
  }

  void launch(const TripletBackward& params, cudaStream_t stream) const {
    const Dtype dtype = params.shape.dtype;
    launch_triplet_products(params.x, params.grad_y, dtype, geometry, products_cut, products, stream);
    launch_triplet_response_backward(response, stream);
    launch_triplet_gate_backward(params.grad_y, params.grad_x, gates, response.grad_pooled, params.saved.index, dtype,
                                 geometry, gate_cut, stream);
  }
};

// Without a sample there is no launch, and the parameters' gradients are sums of nothing.
void clear_parameter_gradients(const TripletBackward& params, cudaStream_t stream) {
  const int64_t real_bytes = params.shape.dtype == Dtype::kFloat64 ? 8 : 4, branches = params.shape.branches;
  const int64_t weights = 2 * params.shape.kernel_size * params.shape.kernel_size;
  cudaMemsetAsync(params.grad_conv_weight, 0, branches * weights * real_bytes, stream);
  cudaMemsetAsync(params.grad_bn_weight, 0, branches * real_bytes, stream);
  cudaMemsetAsync(params.grad_bn_bias, 0, branches * real_bytes, stream);
}

}  // namespace

int64_t triplet_forward_workspace_bytes(const TripletShape& shape) { return forward_bytes(shape, true); }
int64_t triplet_inference_workspace_bytes(const TripletShape& shape) {
  return triplet_is_resident(shape) ? 0 : forward_bytes(shape, false);
}

int64_t triplet_backward_workspace_bytes(const TripletShape& shape) {
  TripletBackward params{};
  params.shape = shape;
  return with_real(shape.dtype, [&](auto real) {
    return most_bytes(shape, [&](int width, Arena& arena) { Backward<decltype(real)>(params, width, width, arena); });
  });
}

void launch_triplet_forward(const TripletForward& params, void* workspace, cudaStream_t stream) {
  run_forward(params, true, workspace, stream);
}

void launch_triplet_inference(const TripletInference& params, void* workspace, cudaStream_t stream) {
  if (params.shape.samples == 0) return;
  if (!triplet_is_resident(params.shape)) return run_forward(as_forward(params), false, workspace, stream);
  const TripletGeometry geometry = TripletGeometry::of(params.shape);
  launch_triplet_resident(params, vector_width(geometry, params.shape.dtype, params.x, params.y), stream);
}

void launch_triplet_backward(const TripletBackward& params, void* workspace, cudaStream_t stream) {
  if (params.shape.samples == 0) return clear_parameter_gradients(params, stream);
  with_real(params.shape.dtype, [&](auto real) {
    Arena arena(workspace);
    const TripletGeometry geometry = TripletGeometry::of(params.shape);
    const int products_width = vector_width(geometry, params.shape.dtype, params.x, params.grad_y);
    const int gate_width = vector_width(geometry, params.shape.dtype, params.grad_y, params.grad_x);
    Backward<decltype(real)>(params, products_width, gate_width, arena).launch(params, stream);
  });
}

}  // namespace hashengine
