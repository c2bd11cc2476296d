// The steps of the triplet ops on the GPU: one launcher per step, and functions that plan the launches. Real is the
// type of the maps: double if x is float64, otherwise float.
#pragma once

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/workspace.h"
#include "cuda/triplet/map_tiles.cuh"
#include "cuda/triplet/maps.cuh"
#include "cuda/triplet/tiles.cuh"

namespace hashengine::triplet {

// --- reduce.cu: one pass over x that reduces it along each axis ---

// Computes the maximum and the sum of x along each axis, in parts (AxisMap in maps.cuh). The caller sets the scale of
// each map to 1 / length of the axis. The scaled sums of the parts then add up to the mean.
template <typename Real>
void launch_reduce_pool(const void* x, Dtype dtype, const Geometry& geometry, const PassPlan& plan,
                        const AxisMaps<Real>& maps, cudaStream_t stream);

// Computes the sums of x * dy along each axis, in parts, multiplied by the scale of each map.
template <typename Real>
void launch_reduce_products(const void* x, const void* grad_y, Dtype dtype, const Geometry& geometry,
                            const PassPlan& plan, const AxisMaps<Real>& maps, cudaStream_t stream);

// --- response.cu: the convolution of the pooled maps, and the statistics that normalize its result ---

constexpr int kResponseColumns = 2;  // columns per thread in response.cu (MapTiling)

template <typename Real>
struct Response {
  BranchMaps<Real> maps;
  const Real* running_mean[kTripletBranches];
  const Real* running_var[kTripletBranches];
  // `pooled` and `index` are null if nothing is saved for a backward. For each branch with BranchMap::shares_index, the
  // launch fills `index` with kNoIndex, so that the apply pass can take minima.
  Real* pooled;
  int32_t* index;
  Real* response;
  Real* mean;       // of the batch if `training`, otherwise the running mean
  Real* var;        // of the batch if `training`, otherwise the running variance
  void* workspace;  // of response_workspace_bytes() bytes
  bool training;
};
template <typename Real>
int64_t response_workspace_bytes(const BranchMaps<Real>& maps);
template <typename Real>
void launch_response(const Response<Real>& params, cudaStream_t stream);

// --- apply.cu: one pass over x or dy that applies the maps to the elements ---

// Computes y, and the index of each maximum if `index` is not null.
template <typename Real>
void launch_apply_gate(const void* x, void* y, const GateMaps<Real>& maps, const Real* pooled, int32_t* index,
                       Dtype dtype, const Geometry& geometry, const PassPlan& plan, cudaStream_t stream);

// Computes dx from dy.
template <typename Real>
void launch_apply_gate_backward(const void* grad_y, void* grad_x, const GateMaps<Real>& maps, const Real* grad_pooled,
                                const int32_t* index, Dtype dtype, const Geometry& geometry, const PassPlan& plan,
                                cudaStream_t stream);

// --- response_backward.cu: from the sums of x * dy to the gradients of the parameters and of the pooled maps ---

template <typename Real>
struct ResponseBackward {
  BranchMaps<Real> maps;  // the sources are the sums of x * dy, divided by the number of branches
  const Real* pooled;
  const Real* response;
  const Real* mean;
  const Real* var;
  Real* grad_affine;  // scratch, flat: the gradient of BatchNorm's result
  // Flat, two channels: the gradient of the maximum; the gradient of the mean, divided by the pooled axis's length.
  Real* grad_pooled;
  Real* grad_conv_weight;
  Real* grad_bn_weight;
  Real* grad_bn_bias;
  void* workspace;  // of response_backward_workspace_bytes() bytes
  bool training;
};
template <typename Real>
int64_t response_backward_workspace_bytes(const BranchMaps<Real>& maps);
template <typename Real>
void launch_response_backward(const ResponseBackward<Real>& params, cudaStream_t stream);

// --- cluster_inference.cu: the whole inference in one launch, if there is a ClusterPlan (cluster_plan.h) ---

// Whether there is a plan, and the current device can run it.
bool has_cluster_inference(const TripletShape& shape);

// `width` is the number of elements per vector along A2, the contiguous axis of x (tiles.cuh).
void launch_cluster_inference(const TripletInference& params, int width, cudaStream_t stream);

// --- planning ---

// Calls function(Real()).
template <typename Function>
auto with_real(Dtype dtype, Function function) {
  return dtype == Dtype::kFloat64 ? function(double()) : function(float());
}

// Calls function(TypeTag<T>()) with the element type of `dtype`. Real must be the type of the maps for this dtype.
template <typename Real, typename Function>
void with_element(Dtype dtype, Function function) {
  if constexpr (std::is_same_v<Real, double>) {
    function(TypeTag<double>());
  } else if (dtype == Dtype::kFloat32) {
    function(TypeTag<float>());
  } else if (dtype == Dtype::kFloat16) {
    function(TypeTag<__half>());
  } else {
    function(TypeTag<__nv_bfloat16>());
  }
}

// Takes memory for the maps of a reduce pass from the workspace. The caller sets the scales.
template <typename Real>
AxisMaps<Real> partial_maps(const Geometry& geometry, const Tiling& tiling, int channels, Workspace& workspace) {
  AxisMaps<Real> maps{};
  for (int a = 0; a < 3; ++a) {
    const Axis& axis = geometry.axis[a];
    if (axis.branch < 0) continue;
    const int64_t sample = channels * axis.numel, part = geometry.samples * sample, parts = tiling.tile_count[a];
    Real* data = workspace.take<Real>(parts * part);
    maps.axis[a] = {data, static_cast<int>(parts), part, sample, axis.numel, axis.inner_size, Real(1)};
  }
  return maps;
}

// The bytes that plan(width, workspace) takes from the workspace: the larger of the numbers for the two widths that
// vector_width can return. The alignment of the arrays is not known when the workspace is allocated.
template <typename Plan>
int64_t workspace_bytes(const TripletShape& shape, Plan plan) {
  Workspace for_vectors(nullptr), for_elements(nullptr);
  plan(widest_vector(Geometry::from_shape(shape), shape.dtype), for_vectors);
  plan(1, for_elements);
  return std::max(for_vectors.bytes(), for_elements.bytes());
}

}  // namespace hashengine::triplet
