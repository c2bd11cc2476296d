// triplet_attention: y = x * mean over the branches of sigmoid(BatchNorm(convolution(pool(x)))).
//   Misra, Nalamada, Arasanipalai, Hou: "Rotate to Attend", WACV 2021 (equation 2).
//
// A branch pools one axis of x [N, C, H, W]. Its map extends over the other two of C, H and W:
//   cw [N, C, W] pools H,   hc [N, H, C] pools W,   hw [N, H, W] pools C.
// A "flat" array stores the maps of all branches one after another, in this order. If there are two branches, they are
// cw and hc. "Real" is the type of every map, parameter and statistic: double if x is float64, otherwise float.
#pragma once

#include "hashengine/parallel.h"
#include "hashengine/simd_level.h"
#include "hashengine/types.h"

namespace hashengine {

constexpr int kTripletBranches = 3;

// The largest kernel_size on the GPU: a tile of a map and its border must fit into shared memory (map_tiles.cuh).
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

  // The number of values in the maps of one branch, for all samples.
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

// The learned parameters, one pointer per branch: conv_weight [2, kernel_size, kernel_size] (the weights of the
// maximum, then the weights of the mean), bn_weight [1] and bn_bias [1]. All are of type Real.
struct TripletParameters {
  const void* conv_weight[kTripletBranches];
  const void* bn_weight[kTripletBranches];
  const void* bn_bias[kTripletBranches];
  double eps;
};

// The results of the forward that the backward needs.
//   pooled    flat, per branch [N, 2, rows, columns]: the maximum, then the mean
//   index     flat: the index of the maximum on the pooled axis; the lowest index if several values are equal
//   response  flat: the result of the convolution
//   mean, var [branches]: the statistics that normalize the response (in training, var is the biased variance)
struct TripletSaved {
  void* pooled;
  int32_t* index;
  void* response;
  void* mean;
  void* var;
};

// running_mean, running_var: [1] per branch. If `training` is true, they are not used. Otherwise they normalize the
// response and are copied to saved.mean and saved.var.
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

// The forward in inference. It uses the running statistics and saves nothing for a backward.
struct TripletInference {
  const void* x;
  void* y;
  TripletParameters parameters;
  const void* running_mean[kTripletBranches];
  const void* running_var[kTripletBranches];
  TripletShape shape;
};

// grad_conv_weight: [branches, 2, kernel_size, kernel_size]; grad_bn_weight, grad_bn_bias: [branches]. All are of type
// Real.
struct TripletBackward {
  const void* grad_y;
  const void* x;
  TripletParameters parameters;
  TripletSaved saved;  // read, not written
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

// Bytes of scratch memory that the launchers below need on the current device. The memory may be uninitialized.
int64_t triplet_forward_workspace_bytes(const TripletShape& shape);
int64_t triplet_inference_workspace_bytes(const TripletShape& shape);
int64_t triplet_backward_workspace_bytes(const TripletShape& shape);
void launch_triplet_forward(const TripletForward& params, void* workspace, cudaStream_t stream);
void launch_triplet_inference(const TripletInference& params, void* workspace, cudaStream_t stream);
void launch_triplet_backward(const TripletBackward& params, void* workspace, cudaStream_t stream);

}  // namespace hashengine
