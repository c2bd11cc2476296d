// triplet_attention_update on the GPU: nine values, one launch, a thread a branch. In plain torch it is a dozen
// launches.

#include "hashengine/triplet_attention_update.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace hashengine {
namespace {

template <typename Real>
__global__ void __launch_bounds__(kWarpThreads) update_kernel(TripletUpdate params) {
#pragma unroll
  for (int branch = 0; branch < kTripletBranches; ++branch)  // a constant index keeps the pointers in the parameters
    if (threadIdx.x == unsigned(branch) && branch < params.branches) triplet_update_branch<Real>(params, branch);
}

}  // namespace

void launch_triplet_update(const TripletUpdate& params, cudaStream_t stream) {
  launch(params.dtype == Dtype::kFloat64 ? update_kernel<double> : update_kernel<float>, 1, kWarpThreads, stream,
         params);
}

}  // namespace hashengine
