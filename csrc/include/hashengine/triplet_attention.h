// triplet_attention: y = x * mean over the branches of sigmoid(BatchNorm(convolution(pool(x)))).
//   Misra, Nalamada, Arasanipalai, Hou: "Rotate to Attend", WACV 2021 (equation 2).
//
// A branch pools one axis of x [N, C, H, W] away and keeps a map over the two others:
//   cw [N, C, W] pools H,   hc [N, H, C] pools W,   hw [N, H, W] pools C.
// Maps of several branches lie one after another, in this order ("flat"); without hw there are two branches.
// "Real" is double for float64, else float: the type of every map, parameter and statistic.
#pragma once

#include "hashengine/parallel.h"
#include "hashengine/simd_level.h"
#include "hashengine/types.h"

namespace hashengine {

constexpr int kTripletBranches = 3;

// On the GPU a tile of the maps with its border has to fit into shared memory.
constexpr int kTripletLargestCudaKernel = 47;

struct TripletShape {
  int64_t samples;
  int64_t channels;
  int64_t height;
  int64_t width;
  int branches;     // 2 or 3
  int kernel_size;  // of the convolution, odd; the padding is kernel_size / 2
  FeatureLayout layout;
  Dtype dtype;

  // Values in a branch's map over all samples.
  int64_t map_numel(int branch) const {
    const int64_t sizes[] = {channels * width, height * channels, height * width};
    return samples * sizes[branch];
  }
  int64_t maps_numel() const {
    int64_t total = 0;
    for (int branch = 0; branch < branches; ++branch) total += map_numel(branch);
    return total;
  }
};

// The learned parameters, a pointer a branch: conv_weight [2, kernel_size, kernel_size] (for the maximum, for the
// mean), bn_weight and bn_bias [1]. Real.
struct TripletParameters {
  const void* conv_weight[kTripletBranches];
  const void* bn_weight[kTripletBranches];
  const void* bn_bias[kTripletBranches];
  double eps;
};

// What backward needs. pooled: flat, a branch [N, 2, rows, columns], the maximum before the mean. index: flat, where
// the maximum lies on the pooled axis, the lowest of equals. response: flat, the convolution's result. mean, var:
// [branches], the statistics that normalise (var divides by the number of values).
struct TripletSaved {
  void* pooled;
  int32_t* index;
  void* response;
  void* mean;
  void* var;
};

// running_mean, running_var: [1] each; read where `training` is false, and then copied to mean and var.
struct TripletForward {
  const void* x;
  void* y;
  TripletParameters parameters;
  const void* running_mean[kTripletBranches];
  const void* running_var[kTripletBranches];
  TripletSaved saved;
  bool training;
  TripletShape shape;
};

// Forward with the running statistics and nothing kept.
struct TripletInference {
  const void* x;
  void* y;
  TripletParameters parameters;
  const void* running_mean[kTripletBranches];
  const void* running_var[kTripletBranches];
  TripletShape shape;
};

// grad_conv_weight: [branches, 2, kernel_size, kernel_size]; grad_bn_weight, grad_bn_bias: [branches]. Real.
struct TripletBackward {
  const void* grad_y;
  const void* x;
  TripletParameters parameters;
  TripletSaved saved;  // only read
  void* grad_x;
  void* grad_conv_weight;
  void* grad_bn_weight;
  void* grad_bn_bias;
  bool training;
  TripletShape shape;
};

void triplet_forward_cpu(const TripletForward& params, SimdLevel level, const ThreadPool& pool);
void triplet_inference_cpu(const TripletInference& params, SimdLevel level, const ThreadPool& pool);
void triplet_backward_cpu(const TripletBackward& params, SimdLevel level, const ThreadPool& pool);

// Bytes of scratch that a launcher needs on the device; it need not be cleared.
int64_t triplet_forward_workspace_bytes(const TripletShape& shape);
int64_t triplet_inference_workspace_bytes(const TripletShape& shape);
int64_t triplet_backward_workspace_bytes(const TripletShape& shape);
void launch_triplet_forward(const TripletForward& params, void* workspace, cudaStream_t stream);
void launch_triplet_inference(const TripletInference& params, void* workspace, cudaStream_t stream);
void launch_triplet_backward(const TripletBackward& params, void* workspace, cudaStream_t stream);

}  // namespace hashengine
