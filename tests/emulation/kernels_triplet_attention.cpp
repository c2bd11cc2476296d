#include "cuda/triplet/cluster_plan.h"
#include "cuda/triplet/passes.h"
#include "hashengine/triplet_attention.h"
#include "triplet_shape.h"

using namespace hashengine;

namespace {

// lists: conv_weight, bn_weight, bn_bias, running_mean, running_var, each with one pointer per branch.
TripletParameters parameters_from(const void* const* lists, int branches, double eps) {
  TripletParameters parameters{{}, {}, {}, eps};
  for (int b = 0; b < branches; ++b) {
    parameters.conv_weight[b] = lists[b];
    parameters.bn_weight[b] = lists[branches + b];
    parameters.bn_bias[b] = lists[2 * branches + b];
  }
  return parameters;
}

TripletSaved saved_from(void* const* saved) {
  return {saved[0], static_cast<int32_t*>(saved[1]), saved[2], saved[3], saved[4]};
}

}  // namespace

extern "C" {

// In all functions, shape is as in triplet_shape.h, and saved has pointers to pooled, index, response, mean and var.
int64_t workspace_bytes_of_triplet_forward(const int64_t* shape) {
  return triplet_forward_workspace_bytes(triplet_shape(shape));
}
int64_t workspace_bytes_of_triplet_inference(const int64_t* shape) {
  return triplet_inference_workspace_bytes(triplet_shape(shape));
}
// Returns the number of blocks per cluster; 0 if inference takes three launches.
int cluster_of_triplet_inference(const int64_t* shape) {
  const TripletShape triplet = triplet_shape(shape);
  return triplet::has_cluster_inference(triplet) ? triplet::ClusterPlan::make(triplet).blocks : 0;
}
int64_t workspace_bytes_of_triplet_backward(const int64_t* shape) {
  return triplet_backward_workspace_bytes(triplet_shape(shape));
}

void triplet_forward(const int64_t* shape, const void* x, void* y, const void* const* lists, void* const* saved,
                     bool training, double eps, void* workspace) {
  TripletForward params{x, y, {}, {}, {}, saved_from(saved), training, triplet_shape(shape)};
  const int branches = params.shape.branches;
  params.parameters = parameters_from(lists, branches, eps);
  for (int b = 0; b < branches; ++b) {
    params.running_mean[b] = lists[3 * branches + b];
    params.running_var[b] = lists[4 * branches + b];
  }
  launch_triplet_forward(params, workspace, nullptr);
}

void triplet_inference(const int64_t* shape, const void* x, void* y, const void* const* lists, double eps,
                       void* workspace) {
  TripletInference params{x, y, {}, {}, {}, triplet_shape(shape)};
  const int branches = params.shape.branches;
  params.parameters = parameters_from(lists, branches, eps);
  for (int b = 0; b < branches; ++b) {
    params.running_mean[b] = lists[3 * branches + b];
    params.running_var[b] = lists[4 * branches + b];
  }
  launch_triplet_inference(params, workspace, nullptr);
}

// grads: the gradients of conv_weight, bn_weight, bn_bias.
void triplet_backward(const int64_t* shape, const void* grad_y, const void* x, const void* const* lists,
                      void* const* saved, void* grad_x, void* const* grads, bool training, double eps,
                      void* workspace) {
  const TripletShape sizes = triplet_shape(shape);
  const TripletParameters parameters = parameters_from(lists, sizes.branches, eps);
  launch_triplet_backward(
      {grad_y, x, parameters, saved_from(saved), grad_x, grads[0], grads[1], grads[2], training, sizes}, workspace,
      nullptr);
}

}  // extern "C"
