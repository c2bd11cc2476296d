// SimAM where a slab (simam_launch.h) stays on chip: in the registers of one block, or of the blocks of a cluster.
//
// Idea. A thread loads up to 64 bytes of x (in the backward of grad_y, too), and keeps them in registers over the sums,
// which go around the slab's threads through shared memory, and around the blocks of a cluster through distributed
// shared memory. The mean comes first and the squares are taken around it: sound, and one more sum costs no memory.
//
// Traffic, N elements of s bytes. Forward: reads x, writes y: 2Ns. Backward: reads x and grad_y, writes grad_x: 3Ns.
// Both are the floor; statistics add 8 bytes (16 for float64) a plane.
//
// Launch. As few threads a block as hold the slab, up to 512 (256 in NHWC and for single elements), and clusters of 2,
// 4 or 8 blocks for slabs above 32 KB (16 KB), up to 256 KB (128 KB); without clusters larger slabs are split.
// Registers allow 512 to 1024 threads on a multiprocessor: 64 bytes each, twice that in the backward, keep 32 to 64 KB
// in flight there or in use, and while one block adds up another loads. In NHWC a row of a slab has 64 bytes, 32 where
// only those stay on chip: whole sectors.
//
// Work, half precision, counted in sm_90a code: about 14 instructions an element forward and 23 backward, two of them
// in the special function unit, and some 200 a thread (500 in NHWC) around them. At 4.3 TB/s an H200 has slots for 27
// and 40 an element. Not measured on a GPU yet.
//
// Limits. 2^31 blocks.

#include "simam_slab.cuh"

namespace hashengine {
namespace {

template <typename Held>
__global__ void HE_SLAB_BOUNDS(Held)
    forward_kernel(SimamForward params, SimamSlabs slabs, SimamTerms<typename Held::Real> terms, int moment_values) {
  using Real = typename Held::Real;
  const SlabPlace<Held> place(slabs, blockIdx.x);
  Real* scratch = dynamic_shared<Real>();

  typename Held::Vectors x;
  Held::load(params.x, place, x);
  if (slabs.parts > 1) cluster_sync();  // all blocks have begun, while the loads are under way

  Real means[Held::kChannels] = {};
  Held::sum(x, place, means);
  slab_sums<Held::kLayout>(slabs, scratch + moment_values, means);
#pragma unroll
  for (int c = 0; c < Held::kChannels; ++c) means[c] *= terms.inverse_positions;

  Real moments[Held::kMoments] = {};
  Held::sum_moments(x, place, means, moments);
  slab_sums<Held::kLayout>(slabs, scratch, moments);

  Real stats[2 * Held::kChannels];
  Held::correct(means, moments, terms.inverse_positions, stats);
#pragma unroll
  for (int c = 0; c < Held::kChannels; ++c) stats[2 * c + 1] *= terms.inverse_freedom;
  if (place.leads && place.part == 0) Held::store_pairs(params.stats, place.channel, stats);
  typename Held::Plane planes[Held::kChannels];
  Held::make_planes(stats, terms.lam, planes);
  Held::store_gated(x, place, planes, params.y);
}

template <typename Held>
__global__ void HE_SLAB_BOUNDS(Held)
    backward_kernel(SimamBackward params, SimamSlabs slabs, SimamTerms<typename Held::Real> terms) {
  using Real = typename Held::Real;
  const SlabPlace<Held> place(slabs, blockIdx.x);

  typename Held::Vectors x, grad_y;
  Held::load(params.x, place, x);
  Held::load(params.grad_y, place, grad_y);
  typename Held::Plane planes[Held::kChannels];
  Held::load_planes(params.stats, place.channel, terms.lam, planes);
  if (slabs.parts > 1) cluster_sync();  // all blocks have begun, while the loads are under way

  Real sums[2 * Held::kChannels] = {};
  typename Held::Reals t;
  Held::sum_slopes(x, grad_y, place, planes, sums, t);
  slab_sums<Held::kLayout>(slabs, dynamic_shared<Real>(), sums);
  Held::store_gradient(x, t, place, planes, sums, terms, params.grad_x);
}

LaunchShape launch_shape(const SimamSlabs& slabs, int64_t scratch_bytes) {
  return {slabs.blocks(), slabs.threads, scratch_bytes, static_cast<int>(slabs.parts)};
}

}  // namespace

void launch_simam_on_chip_forward(const SimamForward& params, const SimamSlabs& slabs, cudaStream_t stream) {
  with_held(params.shape, slabs.width, [&](auto held) {
    using Held = decltype(held);
    using Real = typename Held::Real;
    const int64_t sum_values = slab_scratch_values(slabs, Held::kChannels, slabs.parts);
    const int64_t moment_values = slab_scratch_values(slabs, Held::kMoments, slabs.parts);
    launch(forward_kernel<Held>, launch_shape(slabs, (sum_values + moment_values) * sizeof(Real)), stream, params,
           slabs, SimamTerms<Real>(params.shape, params.lam), static_cast<int>(moment_values));
  });
}

void launch_simam_on_chip_backward(const SimamBackward& params, const SimamSlabs& slabs, cudaStream_t stream) {
  with_held(params.shape, slabs.width, [&](auto held) {
    using Held = decltype(held);
    using Real = typename Held::Real;
    const int64_t values = slab_scratch_values(slabs, 2 * Held::kChannels, slabs.parts);
    launch(backward_kernel<Held>, launch_shape(slabs, values * sizeof(Real)), stream, params, slabs,
           SimamTerms<Real>(params.shape, params.lam));
  });
}

}  // namespace hashengine
