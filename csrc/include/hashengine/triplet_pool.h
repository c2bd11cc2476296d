// triplet_pool: maximum and mean of x [N, C, H, W] over H, over W and over C, for the three branches of triplet
// attention.
//   Misra, Nalamada, Arasanipalai, Hou: "Rotate to Attend", WACV 2021 (equation 1, Z-pool).
#pragma once

#include "hashengine/triplet_attention.h"

namespace hashengine {

// Each branch has a pool and an index. pool: [N, 2, rows, columns] of type Real (triplet_attention.h), the maximum,
// then the mean. index: [N, rows, columns], the index of the maximum on the pooled axis; the lowest index if several
// values equal the maximum. shape.branches is 3; shape.kernel_size is ignored.
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

// Bytes of scratch memory that launch_triplet_pool_forward needs on the current device. The memory may be
// uninitialized.
int64_t triplet_pool_forward_workspace_bytes(const TripletShape& shape);
void launch_triplet_pool_forward(const TripletPoolForward& params, void* workspace, cudaStream_t stream);
void launch_triplet_pool_backward(const TripletPoolBackward& params, cudaStream_t stream);

}  // namespace hashengine
