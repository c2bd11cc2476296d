// triplet_attention_update: updates the running statistics of all branches' BatchNorms, as nn.BatchNorm2d does.
#pragma once

#include "hashengine/triplet_attention.h"

namespace hashengine {

// mean, var: [branches], the statistics of one batch. running_mean, running_var, num_batches_tracked: one value per
// branch. All but num_batches_tracked are of type Real, which `dtype` names.
struct TripletUpdate {
  const void* mean;
  const void* var;
  void* running_mean[kTripletBranches];
  void* running_var[kTripletBranches];
  int64_t* num_batches_tracked[kTripletBranches];
  double unbiased[kTripletBranches];  // count / (count - 1): the factor from the biased to the unbiased variance
  int branches;
  double momentum;  // the weight of this batch; if negative, all batches have equal weights
  Dtype dtype;      // the type of Real: kFloat64 or kFloat32
};

void triplet_update_cpu(const TripletUpdate& params);
void launch_triplet_update(const TripletUpdate& params, cudaStream_t stream);

template <typename Real>
HE_HOST_DEVICE void triplet_update_branch(const TripletUpdate& p, int branch) {
  const int64_t batches = ++*p.num_batches_tracked[branch];
  const Real weight = p.momentum < 0 ? Real(1) / Real(batches) : Real(p.momentum);
  auto move = [weight](void* running, Real value) {
    auto* to = static_cast<Real*>(running);
    *to += weight * (value - *to);
  };
  move(p.running_mean[branch], static_cast<const Real*>(p.mean)[branch]);
  move(p.running_var[branch], static_cast<const Real*>(p.var)[branch] * Real(p.unbiased[branch]));
}

}  // namespace hashengine
