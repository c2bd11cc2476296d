// triplet_attention_update on the GPU. One launch, with one thread per branch, updates three values per branch: the
// running mean, the running variance and the number of batches. Plain torch takes about a dozen launches for this.

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "hashengine/triplet_attention_update.h"

namespace hashengine {
namespace {

template <typename Real>
__global__ void __launch_bounds__(kWarpThreads) update_kernel(TripletUpdate params) {
#pragma unroll
  for (int branch = 0; branch < kTripletBranches; ++branch)  // constant indices avoid a copy of params in local memory
    if (threadIdx.x == unsigned(branch) && branch < params.branches) triplet_update_branch<Real>(params, branch);
}

}  // namespace

void launch_triplet_update(const TripletUpdate& params, cudaStream_t stream) {
  launch(params.dtype == Dtype::kFloat64 ? update_kernel<double> : update_kernel<float>, 1, kWarpThreads, stream,
         params);
}

}  // namespace hashengine
