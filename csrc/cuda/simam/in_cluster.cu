// SimAM of slabs (plan.h) that fit into the registers of one block or of the blocks of a cluster.
//
// Idea. A thread loads up to 64 bytes of x, and of grad_y in the backward. It keeps them in registers while sums are
// exchanged: between the threads of a block through shared memory, between the blocks of a cluster through distributed
// shared memory. The mean is computed first, then the sum of squared deviations from it. This is numerically sound and
// costs no memory traffic, because x is still in the registers.
//
// Traffic, for N elements of s bytes. Forward: reads x, writes y: 2Ns. Backward: reads x and grad_y, writes grad_x:
// 3Ns. Both are the floor. The statistics add 8 bytes (16 for float64) per plane.
//
// Launch. A thread loads either vectors of 16 bytes or, if x is not aligned for them, one element at a time. A block
// has as few threads as can hold the slab, up to 512 (256 in NHWC or without vectors). A block of 512 threads holds 32
// KB. A block of 256 threads holds 16 KB, or 8 KB in half precision without vectors. A larger slab uses a cluster of 2,
// 4 or 8 blocks, which holds up to 256 KB. Where such a cluster cannot run, it is split (split.cu). The registers allow
// 512 to 1024 threads per multiprocessor. Therefore a multiprocessor holds 32 to 64 KB in the forward, and twice as
// much in the backward. If a multiprocessor runs several blocks, one of them loads while another computes sums. In NHWC
// a row of a slab has 64 bytes. It has more if the slab would otherwise have too little work for a block. It has 32
// bytes (one memory sector) if slabs with rows of 64 bytes do not fit.
//
// Instructions, half precision, counted in sm_90a code: about 14 per element forward and 23 backward, two of them in
// the special function unit, plus about 200 per thread (less than 500 in NHWC). Estimate: in the time that an H200
// needs to move the data of one element at 4.3 TB/s, it can issue 27 instructions forward and 40 backward. The time has
// not been measured on a GPU.
//
// Limits. At most 2^31 - 1 blocks.

#include "cuda/simam/slab.cuh"

namespace hashengine::simam {
namespace {

template <typename Fragment>
__global__ void HE_SLAB_BOUNDS(Fragment)
    forward_kernel(SimamForward params, SlabPlan plan, Constants<typename Fragment::Real> constants,
                   int moment_values) {
  using Real = typename Fragment::Real;
  if (plan.parts > 1) cluster_arrive();
  const SlabPlace<Fragment> place(plan, blockIdx.x);
  Real* scratch = dynamic_shared<Real>();

  typename Fragment::Vectors x;
  Fragment::load(params.x, place, x);
  Real means[Fragment::kChannels] = {};
  Fragment::sum(x, place, means);
  if (plan.parts > 1) cluster_wait();  // all blocks have started
  slab_sums<Fragment::kLayout>(plan, scratch + moment_values, means);
#pragma unroll
  for (int c = 0; c < Fragment::kChannels; ++c)
    means[c] = mean_of(means[c], constants.positions, constants.inverse_positions);

  Real moments[Fragment::kMoments] = {};
  Fragment::sum_moments(x, place, means, moments);
  slab_sums<Fragment::kLayout>(plan, scratch, moments);

  Real stats[2 * Fragment::kChannels];
  Fragment::correct(means, moments, constants.inverse_positions, stats);
#pragma unroll
  for (int c = 0; c < Fragment::kChannels; ++c) stats[2 * c + 1] *= constants.inverse_freedom;
  if (place.is_leader && place.part == 0) Fragment::store_pairs(params.stats, place.channel, stats);
  typename Fragment::Plane planes[Fragment::kChannels];
  Fragment::make_planes(stats, constants.lam, planes);
  Fragment::store_gated(x, place, planes, params.y);
}

template <typename Fragment>
__global__ void HE_SLAB_BOUNDS(Fragment)
    backward_kernel(SimamBackward params, SlabPlan plan, Constants<typename Fragment::Real> constants) {
  using Real = typename Fragment::Real;
  if (plan.parts > 1) cluster_arrive();
  const SlabPlace<Fragment> place(plan, blockIdx.x);

  typename Fragment::Vectors x, grad_y;
  Fragment::load(params.x, place, x);
  Fragment::load(params.grad_y, place, grad_y);
  typename Fragment::Plane planes[Fragment::kChannels];
  Fragment::load_planes(params.stats, place.channel, constants.lam, planes);
  Real sums[2 * Fragment::kChannels] = {};
  typename Fragment::Reals t;
  Fragment::sum_slopes(x, grad_y, place, planes, sums, t);
  if (plan.parts > 1) cluster_wait();  // all blocks have started
  slab_sums<Fragment::kLayout>(plan, dynamic_shared<Real>(), sums);
  Fragment::store_gradient(x, t, place, planes, sums, constants, params.grad_x);
}

template <typename Fragment>
int64_t moment_values(const SlabPlan& plan) {
  return slab_scratch_values(plan, Fragment::kMoments, plan.parts);
}

template <typename Fragment>
LaunchShape launch_shape(const SlabPlan& plan, int64_t scratch_values) {
  const auto scratch_bytes = scratch_values * int64_t{sizeof(typename Fragment::Real)};
  return {plan.blocks(), plan.threads, scratch_bytes, static_cast<int>(plan.parts)};
}
template <typename Fragment>
LaunchShape forward_shape(const SlabPlan& plan) {
  return launch_shape<Fragment>(
      plan, slab_scratch_values(plan, Fragment::kChannels, plan.parts) + moment_values<Fragment>(plan));
}
template <typename Fragment>
LaunchShape backward_shape(const SlabPlan& plan) {
  return launch_shape<Fragment>(plan, slab_scratch_values(plan, 2 * Fragment::kChannels, plan.parts));
}

}  // namespace

bool can_run_in_cluster(const SimamShape& shape, const SlabPlan& plan) {
  bool can_run = false;
  with_fragment(shape, plan.width, [&](auto fragment) {
    using Fragment = decltype(fragment);
    can_run = can_launch_cluster(forward_kernel<Fragment>, forward_shape<Fragment>(plan)) &&
              can_launch_cluster(backward_kernel<Fragment>, backward_shape<Fragment>(plan));
  });
  return can_run;
}

void launch_in_cluster_forward(const SimamForward& params, const SlabPlan& plan, cudaStream_t stream) {
  with_fragment(params.shape, plan.width, [&](auto fragment) {
    using Fragment = decltype(fragment);
    launch(forward_kernel<Fragment>, forward_shape<Fragment>(plan), stream, params, plan,
           Constants<typename Fragment::Real>(params.shape, params.lam),
           static_cast<int>(moment_values<Fragment>(plan)));
  });
}

void launch_in_cluster_backward(const SimamBackward& params, const SlabPlan& plan, cudaStream_t stream) {
  with_fragment(params.shape, plan.width, [&](auto fragment) {
    using Fragment = decltype(fragment);
    launch(backward_kernel<Fragment>, backward_shape<Fragment>(plan), stream, params, plan,
           Constants<typename Fragment::Real>(params.shape, params.lam));
  });
}

}  // namespace hashengine::simam
