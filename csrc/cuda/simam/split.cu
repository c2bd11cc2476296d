// SimAM of slabs (plan.h) that fit into no cluster. One pass over all parts computes the sums, and a second pass
// computes the result.
//
// Idea. Each block processes the part of a slab that it can hold, and stores two values per channel. In the forward
// these are the mean and the sum of squared deviations from it, in the backward sum(s) and sum(s * d), with s and d as
// in simam.h. A small kernel merges the values of a slab's parts in a fixed order and in float64. It merges means and
// squares by the method of Chan, Golub and LeVeque (1979), which avoids differences of large sums. Then every part is
// read again.
//
// Traffic, for N elements of b bytes. Forward: reads x twice, writes y: 3Nb. Backward: reads x and grad_y twice, writes
// grad_x: 5Nb. The second pass processes the parts in reverse order, so that it finds in L2 the data that the first
// pass read last. The floors, 2Nb and 3Nb, require that a slab stays on chip; in_cluster.cu states the largest such
// slab. The values in the workspace have 8 bytes (16 for float64) per part and channel.
//
// Launch. Three kernels. The first and the last have up to 512 threads per block, with up to 64 bytes of x per thread,
// as in in_cluster.cu. The merge has one warp per channel.
//
// Limits. At most 2^31 - 1 blocks, each with up to 32 KB of x.

#include "cuda/common/workspace.h"
#include "cuda/simam/slab.cuh"

namespace hashengine::simam {
namespace {

constexpr int kMergeWarps = 8;  // per block

// Stores the part's two values per channel.
template <typename Fragment>
__device__ __forceinline__ void store_partials(const SlabPlan& plan, const SlabPlace<Fragment>& place, void* partials,
                                               const typename Fragment::Real (&pairs)[2 * Fragment::kChannels]) {
  if (!place.is_leader) return;
  const int64_t part = static_cast<int64_t>(place.slab) * plan.parts + place.part;
  const int column = threadIdx.x;  // leaders are threads of the first row
  Fragment::store_pairs(partials, part * plan.slab_channels + column * Fragment::kChannels, pairs);
}

template <typename Fragment>
__global__ void HE_SLAB_BOUNDS(Fragment)
    statistics_kernel(SimamForward params, SlabPlan plan, void* partials, int moment_values) {
  using Real = typename Fragment::Real;
  const SlabPlace<Fragment> place(plan, blockIdx.x);
  Real* scratch = dynamic_shared<Real>();
  typename Fragment::Vectors x;
  Fragment::load(params.x, place, x);

  const auto count = static_cast<Real>(place.rows * (Fragment::kWidth / Fragment::kChannels));
  Real means[Fragment::kChannels] = {}, moments[Fragment::kMoments] = {}, pairs[2 * Fragment::kChannels];
  Fragment::sum(x, place, means);
  slab_sums<Fragment::kLayout>(plan, scratch + moment_values, means);
#pragma unroll
  for (int c = 0; c < Fragment::kChannels; ++c) means[c] = mean_of(means[c], count, Real(1) / count);
  Fragment::sum_moments(x, place, means, moments);
  slab_sums<Fragment::kLayout>(plan, scratch, moments);
  Fragment::correct(means, moments, Real(1) / count, pairs);
  store_partials(plan, place, partials, pairs);
}

template <typename Fragment>
__global__ void HE_SLAB_BOUNDS(Fragment)
    gate_kernel(SimamForward params, SlabPlan plan, Constants<typename Fragment::Real> constants) {
  const SlabPlace<Fragment> place(plan, gridDim.x - 1 - blockIdx.x);
  typename Fragment::Vectors x;
  Fragment::load(params.x, place, x);
  typename Fragment::Plane planes[Fragment::kChannels];
  Fragment::load_planes(params.stats, place.channel, constants.lam, planes);
  Fragment::store_gated(x, place, planes, params.y);
}

template <typename Fragment>
__global__ void HE_SLAB_BOUNDS(Fragment)
    slopes_kernel(SimamBackward params, SlabPlan plan, Constants<typename Fragment::Real> constants, void* partials) {
  using Real = typename Fragment::Real;
  constexpr int kChannels = Fragment::kChannels;
  const SlabPlace<Fragment> place(plan, blockIdx.x);
  typename Fragment::Vectors x, grad_y;
  Fragment::load(params.x, place, x);
  Fragment::load(params.grad_y, place, grad_y);
  typename Fragment::Plane planes[kChannels];
  Fragment::load_planes(params.stats, place.channel, constants.lam, planes);

  Real sums[2 * kChannels] = {};
  typename Fragment::Reals t;  // sum_slopes() writes it; not used here
  Fragment::sum_slopes(x, grad_y, place, planes, sums, t);
  slab_sums<Fragment::kLayout>(plan, dynamic_shared<Real>(), sums);
  store_partials(plan, place, partials, sums);
}

template <typename Fragment>
__global__ void HE_SLAB_BOUNDS(Fragment)
    gradient_kernel(SimamBackward params, SlabPlan plan, Constants<typename Fragment::Real> constants,
                    const void* sums) {
  const SlabPlace<Fragment> place(plan, gridDim.x - 1 - blockIdx.x);
  typename Fragment::Vectors x, grad_y;
  Fragment::load(params.x, place, x);
  Fragment::load(params.grad_y, place, grad_y);
  typename Fragment::Plane planes[Fragment::kChannels];
  Fragment::load_planes(params.stats, place.channel, constants.lam, planes);
  typename Fragment::Real slope_sums[2 * Fragment::kChannels];
  Fragment::load_pairs(sums, place.channel, slope_sums);
  Fragment::store_gradient_recomputed(x, grad_y, place, planes, slope_sums, constants, params.grad_x);
}

// The moments of a set of numbers: their count, their mean, and the sum of squared deviations from the mean.
struct Moments {
  double count, mean, squares;

  __device__ __forceinline__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count;
    const double delta = other.mean - mean;
    squares += other.squares + delta * delta * (count * other.count / total);
    mean += delta * (other.count / total);
    count = total;
  }
};

// A warp merges the pairs of one channel over the parts of a slab. `row_positions` is the number of positions of one
// channel per row.
template <typename Real, bool kIsForward>
__global__ void __launch_bounds__(kMergeWarps* kWarpThreads)
    merge_kernel(SlabPlan plan, int64_t row_positions, const void* partials, void* merged) {
  const int slab_channels = plan.slab_channels;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / kWarpThreads;
  const int64_t slab = index / slab_channels;
  const int channel_in_slab = static_cast<int>(index - slab * slab_channels);
  if (slab >= plan.count) return;  // all lanes of a warp return or none does
  const int64_t sample = slab / plan.slabs_per_sample;
  const int64_t channel = (slab - sample * plan.slabs_per_sample) * slab_channels + channel_in_slab;
  if (channel >= plan.channels) return;

  const unsigned lane = threadIdx.x % kWarpThreads;
  Moments all = {};
  double first = 0, second = 0;  // forward: the mean and the variance; backward: sum(s) and sum(s * d)
  for (unsigned part = lane; part < plan.parts; part += kWarpThreads) {
    const int64_t at = (slab * plan.parts + part) * slab_channels + channel_in_slab;
    const auto& pair = vector_at<2>(static_cast<const Real*>(partials), 2 * at);
    if constexpr (kIsForward) {
      const int64_t rows_left = plan.rows - static_cast<int64_t>(part) * plan.part_rows;
      const int64_t rows = rows_left < plan.part_rows ? rows_left : plan.part_rows;
      all.merge({static_cast<double>(rows * row_positions), pair.at[0], pair.at[1]});
    } else {
      first += pair.at[0];
      second += pair.at[1];
    }
  }
  if constexpr (kIsForward) {
#pragma unroll
    for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
      all.merge({__shfl_down_sync(kWholeWarp, all.count, distance), __shfl_down_sync(kWholeWarp, all.mean, distance),
                 __shfl_down_sync(kWholeWarp, all.squares, distance)});
    }
    first = all.mean;
    second = all.squares / (all.count > 1 ? all.count - 1 : 1);
  } else {
    first = warp_sum(first);
    second = warp_sum(second);
  }
  if (lane == 0)
    vector_at<2>(static_cast<Real*>(merged), 2 * (sample * plan.channels + channel)) = {static_cast<Real>(first),
                                                                                        static_cast<Real>(second)};
}

template <typename Fragment, bool kIsForward>
void launch_merge(const SlabPlan& plan, const void* partials, void* merged, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(plan.count * plan.slab_channels, kMergeWarps);
  launch(merge_kernel<typename Fragment::Real, kIsForward>, blocks, kMergeWarps * kWarpThreads, stream, plan,
         int64_t{Fragment::kWidth / Fragment::kChannels}, partials, merged);
}

// The arrays in the workspace.
template <typename Real>
struct SplitArrays {
  Real* partials;  // [slab, part, channel of the slab, 2]
  Real* sums;      // [samples, channels, 2]: the merged sums of the backward

  SplitArrays(const SlabPlan& plan, const SimamShape& shape, Workspace& workspace)
      : partials(workspace.take<Real>(plan.blocks() * plan.slab_channels * 2)),
        sums(workspace.take<Real>(shape.samples * shape.channels * 2)) {}
};

}  // namespace

int64_t split_workspace_bytes(const SlabPlan& plan, const SimamShape& shape) {
  Workspace workspace(nullptr);
  if (shape.dtype == Dtype::kFloat64) {
    SplitArrays<double>(plan, shape, workspace);
  } else {
    SplitArrays<float>(plan, shape, workspace);
  }
  return workspace.bytes();
}

void launch_split_forward(const SimamForward& params, const SlabPlan& plan, void* workspace, cudaStream_t stream) {
  with_fragment(params.shape, plan.width, [&](auto fragment) {
    using Fragment = decltype(fragment);
    using Real = typename Fragment::Real;
    Workspace memory(workspace);
    Real* partials = SplitArrays<Real>(plan, params.shape, memory).partials;
    const int64_t sum_values = slab_scratch_values(plan, Fragment::kChannels, 1);
    const int64_t moment_values = slab_scratch_values(plan, Fragment::kMoments, 1);
    const LaunchShape shape = {plan.blocks(), plan.threads,
                               (sum_values + moment_values) * static_cast<int64_t>(sizeof(Real))};
    launch(statistics_kernel<Fragment>, shape, stream, params, plan, partials, static_cast<int>(moment_values));
    launch_merge<Fragment, true>(plan, partials, params.stats, stream);
    launch(gate_kernel<Fragment>, plan.blocks(), plan.threads, stream, params, plan,
           Constants<Real>(params.shape, params.lam));
  });
}

void launch_split_backward(const SimamBackward& params, const SlabPlan& plan, void* workspace, cudaStream_t stream) {
  with_fragment(params.shape, plan.width, [&](auto fragment) {
    using Fragment = decltype(fragment);
    using Real = typename Fragment::Real;
    const Constants<Real> constants(params.shape, params.lam);
    Workspace memory(workspace);
    const SplitArrays<Real> arrays(plan, params.shape, memory);
    const int64_t scratch_bytes = slab_scratch_values(plan, 2 * Fragment::kChannels, 1) * sizeof(Real);
    launch(slopes_kernel<Fragment>, {plan.blocks(), plan.threads, scratch_bytes}, stream, params, plan, constants,
           arrays.partials);
    launch_merge<Fragment, false>(plan, arrays.partials, arrays.sums, stream);
    launch(gradient_kernel<Fragment>, plan.blocks(), plan.threads, stream, params, plan, constants, arrays.sums);
  });
}

}  // namespace hashengine::simam
