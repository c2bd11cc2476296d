// SimAM of NCHW planes that fit into the registers of one warp, or of a few of its lanes.
//
// Idea. A team of 1 to 32 lanes processes one plane. A team is as small as the plane allows, but has two
// lanes where 16-byte vectors are loaded, to use whole sectors. A warp therefore processes
// several planes, and the sums need few shuffles and no barrier. Planes of whole 16-byte vectors in aligned arrays, and
// all planes of float64, are loaded to registers directly. All others are staged; the most important are 7 x 7 and 14 x
// 14 in half precision. The planes of a block are contiguous in memory. In staging they are copied to shared memory and
// back as one array, in 16-byte pieces if the array is aligned, whatever the size of a plane. The threads then access
// the single elements in shared memory.
//
// Traffic, for N elements of s bytes. Forward 2Ns, backward 3Ns: the floors.
//
// Launch. 256 threads per block. A thread holds up to 64 bytes (16 elements if staged) of x, and of grad_y in the
// backward. With 4 to 8 blocks per multiprocessor (an estimate), 32 KB or more are in flight. Copies of 16-byte
// pieces to shared memory are asynchronous and need no registers.
//
// Instructions, half precision, counted in sm_90a code: for planes of 28 x 28, whose vectors occupy three quarters of
// the registers of a warp, about 27 per element forward and 37 backward. For planes of 14 x 14, which are staged, 44
// per element forward and 65 backward. The time has not been measured on a GPU.
//
// Limits. Planes of up to 128 vectors, or of 512 elements if staged, or of 256 elements of float64; 2^31 - 1 blocks.

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/staging.cuh"
#include "cuda/simam/fragment.cuh"
#include "cuda/simam/plan.h"

namespace hashengine::simam {
namespace {

constexpr int kThreads = 256;  // per block

// The fragment of a thread is the elements that it holds in registers. This struct says where the thread loads and
// stores them: in device memory or, if `in_tile`, in the block's tile in shared memory.
template <typename Fragment>
struct TeamPlace : FragmentPlace {
  int64_t plane;
  int team_log2;
  bool is_leader;

  __device__ __forceinline__ TeamPlace(const WarpPlan& plan, int64_t positions, bool in_tile)
      : team_log2(plan.team_log2) {
    const int team = 1 << team_log2;
    const int lane = threadIdx.x & (team - 1);
    const int plane_in_block = threadIdx.x >> team_log2;
    plane = static_cast<int64_t>(blockIdx.x) * (kThreads >> team_log2) + plane_in_block;
    begin = (in_tile ? plane_in_block : plane) * positions + lane * Fragment::kWidth;
    stride = team * Fragment::kWidth;
    const int vectors = static_cast<int>(positions) / Fragment::kWidth;
    count = plane < plan.planes && lane < vectors ? ((vectors - 1 - lane) >> team_log2) + 1 : 0;
    is_leader = plane < plan.planes && lane == 0;
  }
};

// Sums over the lanes of a team. Every lane gets the result.
template <int kSums, typename Real>
__device__ __forceinline__ void team_sums(int team_log2, Real (&sums)[kSums]) {
  for (int distance = (1 << team_log2) / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], distance);
  }
}

// The elements of all planes of a block, which are contiguous in memory.
struct Run {
  int64_t begin;
  int count;

  __device__ __forceinline__ Run(const WarpPlan& plan, int64_t positions) {
    const int planes = kThreads >> plan.team_log2;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * planes;
    const int64_t left = plan.planes - first;
    begin = first * positions;
    count = static_cast<int>((left < planes ? left : planes) * positions);
  }
};

template <typename Fragment, bool kIsStaged>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(SimamForward params, WarpPlan plan, Constants<typename Fragment::Real> constants) {
  using T = typename Fragment::T;
  using Real = typename Fragment::Real;
  const int64_t positions = params.shape.positions;
  const TeamPlace<Fragment> place(plan, positions, kIsStaged);
  const Run run(plan, positions);
  const void* source = params.x;
  void* target = params.y;
  if constexpr (kIsStaged) {
    stage(static_cast<const T*>(params.x) + run.begin, run.count, dynamic_shared<T>());
    wait_for_staged();
    source = target = dynamic_shared<T>();
  }
  typename Fragment::Vectors x;
  Fragment::load(source, place, x);

  Real means[1] = {}, moments[Fragment::kMoments] = {}, stats[2];
  Fragment::sum(x, place, means);
  team_sums(place.team_log2, means);
  means[0] = mean_of(means[0], constants.positions, constants.inverse_positions);
  Fragment::sum_moments(x, place, means, moments);
  team_sums(place.team_log2, moments);
  Fragment::correct(means, moments, constants.inverse_positions, stats);
  stats[1] *= constants.inverse_freedom;
  if (place.is_leader) Fragment::store_pairs(params.stats, place.plane, stats);
  typename Fragment::Plane planes[1];
  Fragment::make_planes(stats, constants.lam, planes);
  Fragment::store_gated(x, place, planes, target);
  if constexpr (kIsStaged) {
    __syncthreads();
    unstage(dynamic_shared<T>(), run.count, static_cast<T*>(params.y) + run.begin);
  }
}

template <typename Fragment, bool kIsStaged>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(SimamBackward params, WarpPlan plan, Constants<typename Fragment::Real> constants) {
  using T = typename Fragment::T;
  using Real = typename Fragment::Real;
  const int64_t positions = params.shape.positions;
  const TeamPlace<Fragment> place(plan, positions, kIsStaged);
  const Run run(plan, positions);
  const void *x_source = params.x, *grad_source = params.grad_y;
  void* target = params.grad_x;
  if constexpr (kIsStaged) {
    T* tile = dynamic_shared<T>();
    T* grad_tile = tile + (kThreads >> plan.team_log2) * positions;
    stage(static_cast<const T*>(params.x) + run.begin, run.count, tile);
    stage(static_cast<const T*>(params.grad_y) + run.begin, run.count, grad_tile);
    wait_for_staged();
    x_source = target = tile;
    grad_source = grad_tile;
  }
  typename Fragment::Vectors x, grad_y;
  Fragment::load(x_source, place, x);
  Fragment::load(grad_source, place, grad_y);
  typename Fragment::Plane planes[1];
  Fragment::load_planes(params.stats, place.count ? place.plane : 0, constants.lam, planes);

  Real sums[2] = {};
  typename Fragment::Reals t;
  Fragment::sum_slopes(x, grad_y, place, planes, sums, t);
  team_sums(place.team_log2, sums);
  Fragment::store_gradient(x, t, place, planes, sums, constants, target);
  if constexpr (kIsStaged) {
    __syncthreads();
    unstage(dynamic_shared<T>(), run.count, static_cast<T*>(params.grad_x) + run.begin);
  }
}

// Calls function(Fragment(), std::bool_constant<is_staged>()).
template <typename Function>
void with_team_fragment(Dtype dtype, bool is_staged, Function function) {
  with_floating_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (is_staged) {
      function(Fragment<T, 1, FeatureLayout::kContiguous>(), std::true_type());
    } else {
      function(Fragment<T, kFullWidth<T>, FeatureLayout::kContiguous>(), std::false_type());
    }
  });
}

LaunchShape launch_shape(const WarpPlan& plan, int64_t positions, int64_t element_bytes) {
  const int64_t planes = kThreads >> plan.team_log2;
  return {ceil_div(plan.planes, planes), kThreads, plan.is_staged ? planes * positions * element_bytes : 0};
}

}  // namespace

void launch_in_warp_forward(const SimamForward& params, const WarpPlan& plan, cudaStream_t stream) {
  with_team_fragment(params.shape.dtype, plan.is_staged, [&](auto fragment, auto is_staged) {
    using Fragment = decltype(fragment);
    launch(forward_kernel<Fragment, decltype(is_staged)::value>,
           launch_shape(plan, params.shape.positions, sizeof(typename Fragment::T)), stream, params, plan,
           Constants<typename Fragment::Real>(params.shape, params.lam));
  });
}

void launch_in_warp_backward(const SimamBackward& params, const WarpPlan& plan, cudaStream_t stream) {
  with_team_fragment(params.shape.dtype, plan.is_staged, [&](auto fragment, auto is_staged) {
    using Fragment = decltype(fragment);
    launch(backward_kernel<Fragment, decltype(is_staged)::value>,
           launch_shape(plan, params.shape.positions, 2 * sizeof(typename Fragment::T)), stream, params, plan,
           Constants<typename Fragment::Real>(params.shape, params.lam));
  });
}

}  // namespace hashengine::simam
