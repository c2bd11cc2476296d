// triplet_attention on the GPU: forward, inference and backward as sequences of launches (passes.h), and their
// workspaces. The titles below state the bytes that are moved, for a feature map of N elements of s bytes.
//
// Forward in training, 3Ns:
//   reduce.cu             reads x; writes the pooled maps
//   response.cu           maps only; convolution and batch statistics
//   apply.cu              reads x and writes y
//   3Ns is the floor because the statistics of the whole batch are needed between the two reads of x.
// Inference, 2Ns (the floor):
//   cluster_inference.cu  one launch, if a sample fits into the shared memory of a cluster of blocks
//   Otherwise, 3Ns: the launches of the forward, with the running statistics. Nothing is saved.
// Backward, 4Ns (the floor):
//   reduce.cu             reads x and dy; writes the sums of x * dy
//   response_backward.cu  maps only; three launches
//   apply.cu              reads dy and writes dx
//
// Per value of a map, the forward saves 16 bytes (28 for float64) for the backward: maximum, mean, response and index.
// All other maps are in the workspace.

#include "cuda/triplet/passes.h"
#include "hashengine/triplet_attention.h"

namespace hashengine {
namespace {

using namespace triplet;

// The plan and the arrays of a forward. If `saves` is false, it is an inference: nothing is saved for a backward.
template <typename Real>
struct Forward {
  Geometry geometry;
  PassPlan reduce_plan;
  PassPlan apply_plan;
  AxisMaps<Real> pooled;
  Response<Real> response{};
  GateMaps<Real> gates;

  Forward(const TripletForward& params, bool saves, int width, Workspace& workspace)
      : geometry(Geometry::from_shape(params.shape)),
        reduce_plan(PassPlan::for_reduce<Real>(geometry, width)),
        apply_plan(PassPlan::for_apply(geometry, width)),
        pooled(partial_maps<Real>(geometry, reduce_plan.tiling, 2, workspace)) {
    bool is_saved[kTripletBranches] = {};
    for (int a = 0; a < 3; ++a) {
      const Axis& axis = geometry.axis[a];
      pooled.axis[a].scale = Real(1) / static_cast<Real>(geometry.size[a]);
      if (!params.saved.pooled || axis.branch < 0 || axis.transposed || reduce_plan.splits(a)) continue;
      // The reduce pass makes this map in one part and in the order of saved.pooled. Therefore it writes the map there
      // directly.
      is_saved[axis.branch] = true;
      pooled.axis[a].data = static_cast<Real*>(params.saved.pooled) + 2 * axis.flat_begin;
    }
    response.maps = BranchMaps<Real>::make(geometry, params.shape, params.parameters, pooled, 2, kResponseColumns);
    for (int a = 0; a < 3; ++a) {
      const int branch = geometry.axis[a].branch;
      if (branch < 0) continue;
      BranchMap<Real>& map = response.maps.branch[branch];
      map.is_saved = is_saved[branch];
      map.shares_index = a == 0 || apply_plan.splits(a);
      response.running_mean[branch] = static_cast<const Real*>(params.running_mean[branch]);
      response.running_var[branch] = static_cast<const Real*>(params.running_var[branch]);
    }
    response.training = params.training;
    response.workspace = workspace.take<char>(response_workspace_bytes(response.maps));
    if (saves) {
      response.pooled = static_cast<Real*>(params.saved.pooled);
      response.index = params.saved.index;
      response.response = static_cast<Real*>(params.saved.response);
      response.mean = static_cast<Real*>(params.saved.mean);
      response.var = static_cast<Real*>(params.saved.var);
    } else {
      response.response = workspace.take<Real>(params.shape.maps_numel());
      response.mean = workspace.take<Real>(geometry.branches);
      response.var = workspace.take<Real>(geometry.branches);
    }
    gates = GateMaps<Real>::make(geometry, params.parameters, response.response, response.mean, response.var);
  }

  void launch(const TripletForward& params, cudaStream_t stream) const {
    if (geometry.samples == 0) return launch_response(response, stream);  // copies the running statistics
    launch_reduce_pool(params.x, params.shape.dtype, geometry, reduce_plan, pooled, stream);
    launch_response(response, stream);
    launch_apply_gate(params.x, params.y, gates, response.pooled, response.index, params.shape.dtype, geometry,
                      apply_plan, stream);
  }
};

int64_t forward_workspace_bytes(const TripletShape& shape, bool saves) {
  TripletForward params{};
  params.shape = shape;
  return with_real(shape.dtype, [&](auto real) {
    return workspace_bytes(
        shape, [&](int width, Workspace& workspace) { Forward<decltype(real)>(params, saves, width, workspace); });
  });
}

void run_forward(const TripletForward& params, bool saves, void* memory, cudaStream_t stream) {
  with_real(params.shape.dtype, [&](auto real) {
    Workspace workspace(memory);
    const int width = vector_width(Geometry::from_shape(params.shape), params.shape.dtype, params.x, params.y);
    Forward<decltype(real)>(params, saves, width, workspace).launch(params, stream);
  });
}

TripletForward as_forward(const TripletInference& params) {
  TripletForward forward{params.x, params.y, params.parameters, {}, {}, {}, false, params.shape};
  std::copy_n(params.running_mean, kTripletBranches, forward.running_mean);
  std::copy_n(params.running_var, kTripletBranches, forward.running_var);
  return forward;
}

// The plan and the arrays of a backward.
template <typename Real>
struct Backward {
  Geometry geometry;
  PassPlan reduce_plan;
  PassPlan apply_plan;
  AxisMaps<Real> products;
  ResponseBackward<Real> response{};
  GateMaps<Real> gates;

  Backward(const TripletBackward& params, int reduce_width, int apply_width, Workspace& workspace)
      : geometry(Geometry::from_shape(params.shape)),
        reduce_plan(PassPlan::for_reduce<Real>(geometry, reduce_width)),
        apply_plan(PassPlan::for_apply(geometry, apply_width)),
        products(partial_maps<Real>(geometry, reduce_plan.tiling, 1, workspace)),
        gates(GateMaps<Real>::make(geometry, params.parameters, params.saved.response, params.saved.mean,
                                   params.saved.var)) {
    for (AxisMap<Real>& map : products.axis) map.scale = gates.branch_weight;
    const int64_t values = params.shape.maps_numel();
    response.maps =
        BranchMaps<Real>::make(geometry, params.shape, params.parameters, products, MapTiling::kBackwardPlanes, 1);
    response.pooled = static_cast<const Real*>(params.saved.pooled);
    response.response = gates.response;
    response.mean = gates.mean;
    response.var = gates.var;
    response.grad_affine = workspace.take<Real>(values);
    response.grad_pooled = workspace.take<Real>(2 * values);
    response.grad_conv_weight = static_cast<Real*>(params.grad_conv_weight);
    response.grad_bn_weight = static_cast<Real*>(params.grad_bn_weight);
    response.grad_bn_bias = static_cast<Real*>(params.grad_bn_bias);
    response.workspace = workspace.take<char>(response_backward_workspace_bytes(response.maps));
    response.training = params.training;
  }

  void launch(const TripletBackward& params, cudaStream_t stream) const {
    const Dtype dtype = params.shape.dtype;
    launch_reduce_products(params.x, params.grad_y, dtype, geometry, reduce_plan, products, stream);
    launch_response_backward(response, stream);
    launch_apply_gate_backward(params.grad_y, params.grad_x, gates, response.grad_pooled, params.saved.index, dtype,
                               geometry, apply_plan, stream);
  }
};

// Sets the gradients of the parameters to zero. An empty batch has these gradients.
void clear_parameter_gradients(const TripletBackward& params, cudaStream_t stream) {
  const int64_t real_bytes = params.shape.dtype == Dtype::kFloat64 ? 8 : 4, branches = params.shape.branches;
  const int64_t weights = 2 * params.shape.kernel_size * params.shape.kernel_size;
  cudaMemsetAsync(params.grad_conv_weight, 0, branches * weights * real_bytes, stream);
  cudaMemsetAsync(params.grad_bn_weight, 0, branches * real_bytes, stream);
  cudaMemsetAsync(params.grad_bn_bias, 0, branches * real_bytes, stream);
}

}  // namespace

int64_t triplet_forward_workspace_bytes(const TripletShape& shape) { return forward_workspace_bytes(shape, true); }

int64_t triplet_inference_workspace_bytes(const TripletShape& shape) {
  return has_cluster_inference(shape) ? 0 : forward_workspace_bytes(shape, false);
}

int64_t triplet_backward_workspace_bytes(const TripletShape& shape) {
  TripletBackward params{};
  params.shape = shape;
  return with_real(shape.dtype, [&](auto real) {
    return workspace_bytes(
        shape, [&](int width, Workspace& workspace) { Backward<decltype(real)>(params, width, width, workspace); });
  });
}

void launch_triplet_forward(const TripletForward& params, void* workspace, cudaStream_t stream) {
  run_forward(params, true, workspace, stream);
}

void launch_triplet_inference(const TripletInference& params, void* workspace, cudaStream_t stream) {
  if (params.shape.samples == 0) return;
  if (!has_cluster_inference(params.shape)) return run_forward(as_forward(params), false, workspace, stream);
  const Geometry geometry = Geometry::from_shape(params.shape);
  launch_cluster_inference(params, vector_width(geometry, params.shape.dtype, params.x, params.y), stream);
}

void launch_triplet_backward(const TripletBackward& params, void* workspace, cudaStream_t stream) {
  if (params.shape.samples == 0) return clear_parameter_gradients(params, stream);
  with_real(params.shape.dtype, [&](auto real) {
    Workspace arrays(workspace);
    const Geometry geometry = Geometry::from_shape(params.shape);
    const int reduce_width = vector_width(geometry, params.shape.dtype, params.x, params.grad_y);
    const int apply_width = vector_width(geometry, params.shape.dtype, params.grad_y, params.grad_x);
    Backward<decltype(real)>(params, reduce_width, apply_width, arrays).launch(params, stream);
  });
}

}  // namespace hashengine
