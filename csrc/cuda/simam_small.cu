// SimAM of NCHW planes that one warp, or a team of a few of its lanes, can hold in registers.
//
// Idea. A team of 1 to 32 lanes takes a plane: as few as can hold it, so that a warp works on several and sums need few
// shuffles and no barrier. Planes of whole 16-byte vectors go straight to registers. All others, above all 7 x 7 and 14
// x 14 in half precision, are staged: the planes of a block are one run of memory, which is copied to shared memory and
// back in 16-byte pieces, however odd the planes in it are; only shared memory is read by element.
//
// Traffic, N elements of s bytes. Forward 2Ns, backward 3Ns: the floors.
//
// Launch. 256 threads a block, each with up to 64 bytes (16 elements where staged) of x, in the backward of grad_y,
// too; 4 to 8 blocks a multiprocessor keep 32 KB or more in flight. Copies to shared memory are asynchronous: they need
// no registers.
//
// Work, half precision, counted in sm_90a code: about 21 instructions an element forward and 31 backward; staged three
// more. Not measured on a GPU yet.
//
// Limits. Planes of up to 128 vectors, or 512 elements (256 of float64) where staged; 2^31 blocks.
#include "launch.cuh"
#include "reduce.cuh"
#include "simam.cuh"
#include "simam_launch.h"
#include "staging.cuh"

namespace hashengine {
namespace {

constexpr int kSmallThreads = 256;

// What one thread holds, in memory, or in the block's tile of shared memory.
template <typename Held>
struct TeamPlace : HeldPlace {
  int64_t plane;
  int team_log2;
  bool leads;

  __device__ __forceinline__ TeamPlace(const SimamSmall& small, int64_t positions, bool in_tile)
      : team_log2(small.team_log2) {
    const int team = 1 << team_log2;
    const int lane = threadIdx.x & (team - 1);
    const int plane_in_block = threadIdx.x >> team_log2;
    plane = static_cast<int64_t>(blockIdx.x) * (kSmallThreads >> team_log2) + plane_in_block;
    begin = (in_tile ? plane_in_block : plane) * positions + lane * Held::kWidth;
    stride = team * Held::kWidth;
    const int vectors = static_cast<int>(positions) / Held::kWidth;
    count = plane < small.planes && lane < vectors ? ((vectors - 1 - lane) >> team_log2) + 1 : 0;
    leads = plane < small.planes && lane == 0;
  }
};

// Over the lanes of a team, the same in each.
template <int kSums, typename Real>
__device__ __forceinline__ void team_sums(int team_log2, Real (&sums)[kSums]) {
  for (int distance = (1 << team_log2) / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], distance);
  }
}

// The run of elements that a block's planes are.
struct Run {
  int64_t begin;
  int count;

  __device__ __forceinline__ Run(const SimamSmall& small, int64_t positions) {
    const int planes = kSmallThreads >> small.team_log2;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * planes;
    const int64_t left = small.planes - first;
    begin = first * positions;
    count = static_cast<int>((left < planes ? left : planes) * positions);
  }
};

template <typename Held, bool kIsStaged>
__global__ void __launch_bounds__(kSmallThreads)
    forward_kernel(SimamForward params, SimamSmall small, SimamTerms<typename Held::Real> terms) {
  using T = typename Held::T;
  using Real = typename Held::Real;
  const int64_t positions = params.shape.positions;
  const TeamPlace<Held> place(small, positions, kIsStaged);
  const Run run(small, positions);
  const void* source = params.x;
  void* target = params.y;
  if constexpr (kIsStaged) {
    stage(static_cast<const T*>(params.x) + run.begin, run.count, dynamic_shared<T>());
    wait_for_staged();
    source = target = dynamic_shared<T>();
  }
  typename Held::Vectors x;
  Held::load(source, place, x);

  Real means[1] = {}, moments[Held::kMoments] = {}, stats[2];
  Held::sum(x, place, means);
  team_sums(place.team_log2, means);
  means[0] *= terms.inverse_positions;
  Held::sum_moments(x, place, means, moments);
  team_sums(place.team_log2, moments);
  Held::correct(means, moments, terms.inverse_positions, stats);
  stats[1] *= terms.inverse_freedom;
  if (place.leads) Held::store_pairs(params.stats, place.plane, stats);
  typename Held::Plane planes[1];
  Held::make_planes(stats, terms.lam, planes);
  Held::store_gated(x, place, planes, target);
  if constexpr (kIsStaged) {
    __syncthreads();
    unstage(dynamic_shared<T>(), run.count, static_cast<T*>(params.y) + run.begin);
  }
}

template <typename Held, bool kIsStaged>
__global__ void __launch_bounds__(kSmallThreads)
    backward_kernel(SimamBackward params, SimamSmall small, SimamTerms<typename Held::Real> terms) {
  using T = typename Held::T;
  using Real = typename Held::Real;
  const int64_t positions = params.shape.positions;
  const TeamPlace<Held> place(small, positions, kIsStaged);
  const Run run(small, positions);
  const void *x_source = params.x, *grad_source = params.grad_y;
  void* target = params.grad_x;
  if constexpr (kIsStaged) {
    T* tile = dynamic_shared<T>();
    T* grad_tile = tile + (kSmallThreads >> small.team_log2) * positions;
    stage(static_cast<const T*>(params.x) + run.begin, run.count, tile);
    stage(static_cast<const T*>(params.grad_y) + run.begin, run.count, grad_tile);
    wait_for_staged();
    x_source = target = tile;
    grad_source = grad_tile;
  }
  typename Held::Vectors x, grad_y;
  Held::load(x_source, place, x);
  Held::load(grad_source, place, grad_y);
  typename Held::Plane planes[1];
  Held::load_planes(params.stats, place.count ? place.plane : 0, terms.lam, planes);

  Real sums[2] = {};
  typename Held::Reals t;
  Held::sum_slopes(x, grad_y, place, planes, sums, t);
  team_sums(place.team_log2, sums);
  Held::store_gradient(x, t, place, planes, sums, terms, target);
  if constexpr (kIsStaged) {
    __syncthreads();
    unstage(dynamic_shared<T>(), run.count, static_cast<T*>(params.grad_x) + run.begin);
  }
}

// Calls function(Held, std::bool_constant<is_staged>).
template <typename Function>
void with_small(Dtype dtype, bool is_staged, Function function) {
  with_floating_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (is_staged) {
      function(Held<T, 1, FeatureLayout::kContiguous>(), std::true_type());
    } else {
      function(Held<T, kFullWidth<T>, FeatureLayout::kContiguous>(), std::false_type());
    }
  });
}

LaunchShape launch_shape(const SimamSmall& small, int64_t positions, int64_t element_bytes) {
  const int64_t planes = kSmallThreads >> small.team_log2;
  return {ceil_div(small.planes, planes), kSmallThreads, small.is_staged ? planes * positions * element_bytes : 0};
}

}  // namespace

void launch_simam_small_forward(const SimamForward& params, const SimamSmall& small, cudaStream_t stream) {
  with_small(params.shape.dtype, small.is_staged, [&](auto held, auto is_staged) {
    using Held = decltype(held);
    launch(forward_kernel<Held, decltype(is_staged)::value>,
           launch_shape(small, params.shape.positions, sizeof(typename Held::T)), stream, params, small,
           SimamTerms<typename Held::Real>(params.shape, params.lam));
  });
}

void launch_simam_small_backward(const SimamBackward& params, const SimamSmall& small, cudaStream_t stream) {
  with_small(params.shape.dtype, small.is_staged, [&](auto held, auto is_staged) {
    using Held = decltype(held);
    launch(backward_kernel<Held, decltype(is_staged)::value>,
           launch_shape(small, params.shape.positions, 2 * sizeof(typename Held::T)), stream, params, small,
           SimamTerms<typename Held::Real>(params.shape, params.lam));
  });
}

}  // namespace hashengine
