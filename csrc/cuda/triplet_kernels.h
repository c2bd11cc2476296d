// The launches that triplet attention on the GPU is made of. Real is the type of the maps: double for float64, else
// float.
#pragma once

#include "launch.cuh"
#include "triplet_gate_maps.cuh"
#include "triplet_maps.cuh"

namespace hashengine {

// How a pass over x cuts it.
struct TripletCut {
  int width;  // of vectors
  TripletTiling tiling;

  static TripletCut to_reduce(const TripletGeometry& geometry, int width) {
    return of(geometry, width, triplet_reduce_vectors(width));
  }
  static TripletCut to_apply(const TripletGeometry& geometry, int width) {
    return of(geometry, width, triplet_apply_vectors(width));
  }
  // Whether several blocks have parts of one line along the axis.
  bool is_shared(int axis) const { return tiling.parts[axis] > 1; }

 private:
  static TripletCut of(const TripletGeometry& geometry, int width, int thread_vectors) {
    return {width, TripletTiling::of(geometry, kTripletThreads * thread_vectors * width, width)};
  }
};

// Calls function(TypeTag<T>()) with the element type that dtype names, one whose maps are of Real.
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

// The maximum and the mean of x over each axis.
template <typename Real>
void launch_triplet_pool(const void* x, Dtype dtype, const TripletGeometry& geometry, const TripletCut& cut,
                         const AxisMaps<Real>& maps, cudaStream_t stream);

// The sums of dy x over each axis.
template <typename Real>
void launch_triplet_products(const void* x, const void* grad_y, Dtype dtype, const TripletGeometry& geometry,
                             const TripletCut& cut, const AxisMaps<Real>& maps, cudaStream_t stream);

// The convolution of the pooled maps, and the statistics that normalise its result: the batch's where `training`, else
// the running ones.
template <typename Real>
struct TripletResponse {
  BranchMaps<Real> maps;
  const Real* running_mean[kTripletBranches];
  const Real* running_var[kTripletBranches];
  Real* pooled;    // null: not saved
  int32_t* index;  // null: not saved; maps that share_index are set to INT_MAX, for the gate to find the least
  Real* response;
  Real* mean;
  Real* var;
  void* workspace;  // triplet_response_workspace_bytes
  bool training;
};
template <typename Real>
int64_t triplet_response_workspace_bytes(const BranchMaps<Real>& maps);
template <typename Real>
void launch_triplet_response(const TripletResponse<Real>& params, cudaStream_t stream);

// y, and the index of each maximum where `index` is not null.
template <typename Real>
void launch_triplet_gate(const void* x, void* y, const GateMaps<Real>& maps, const Real* pooled, int32_t* index,
                         Dtype dtype, const TripletGeometry& geometry, const TripletCut& cut, cudaStream_t stream);

// From the sums of dy x, which are the sources of the maps, to the gradients of the parameters and of the pooled maps.
template <typename Real>
struct TripletResponseBackward {
  BranchMaps<Real> maps;
  const Real* pooled;
  const Real* response;
  const Real* mean;
  const Real* var;
  Real* grad_affine;  // scratch, a map
  Real* grad_pooled;  // of the maximum, and of a single element through the mean
  Real* grad_conv_weight;
  Real* grad_bn_weight;
  Real* grad_bn_bias;
  void* workspace;  // triplet_response_backward_workspace_bytes
  bool training;
};
template <typename Real>
int64_t triplet_response_backward_workspace_bytes(const BranchMaps<Real>& maps);
template <typename Real>
void launch_triplet_response_backward(const TripletResponseBackward<Real>& params, cudaStream_t stream);

// dx.
template <typename Real>
void launch_triplet_gate_backward(const void* grad_y, void* grad_x, const GateMaps<Real>& maps, const Real* grad_pooled,
                                  const int32_t* index, Dtype dtype, const TripletGeometry& geometry,
                                  const TripletCut& cut, cudaStream_t stream);

}  // namespace hashengine
