// triplet_pool: maximum and mean of x [N, C, H, W] over H, over W and over C, the three branches of triplet attention.
//   Misra, Nalamada, Arasanipalai, Hou: "Rotate to Attend", WACV 2021 (equation 1, Z-pool).
#pragma once

#include "hashengine/triplet_attention.h"

namespace hashengine {

// A branch's pool: [N, 2, rows, columns], the maximum before the mean, Real. Its index: [N, rows, columns], where the
// maximum lies on the pooled axis, the lowest of equals. shape.branches is 3; shape.kernel_size is not used.
struct TripletPoolForward {
  const void* x;
  void* pool[kTripletBranches];
  int32_t* index[kTripletBranches];
  TripletShape shape;
};

struct TripletPoolBackward {
  const void* grad_pool[kTripletBranches];
  const int32_t* index[kTripletBranches];
  void* grad_x;
  TripletShape shape;
};

void triplet_pool_forward_cpu(const TripletPoolForward& params, SimdLevel level, const ThreadPool& pool);
void triplet_pool_backward_cpu(const TripletPoolBackward& params, SimdLevel level, const ThreadPool& pool);

// Bytes of scratch that a launcher needs on the device; it need not be cleared.
int64_t triplet_pool_forward_workspace_bytes(const TripletShape& shape);
void launch_triplet_pool_forward(const TripletPoolForward& params, void* workspace, cudaStream_t stream);
void launch_triplet_pool_backward(const TripletPoolBackward& params, cudaStream_t stream);

}  // namespace hashengine
