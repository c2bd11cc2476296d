// greedy_sign on the GPU: b = +1 where u >= 0 else -1 with penalty = alpha * mean(||u| - 1|^3), and the backward.
//
// Idea. Elementwise work is bound by memory, so every array moves once, 128 bits an instruction, and the penalty rides
// along: each thread adds up its elements, each block its threads, and the block that finishes last adds up the blocks.
// No atomic touches a float, so the same input gives the same bits in every run. A batch of up to 16,384 elements
// (256 codes of 64 bits) is one block, which needs no count of blocks and hence no memset before it.
//
// Traffic, N elements of s bytes. Forward: reads u, writes b: 2Ns, the floor; the blocks' sums add at most 16/4096 N.
// Backward: reads grad_b and u, writes grad_u: 3Ns, the floor; a null gradient saves a read (2Ns).
//
// Launch. 256 threads a block, 16 elements a thread (a thread has 32 bytes in flight for half precision, 128 for
// float64); each block takes one tile, so the hardware balances the load. Forward: one kernel, above one block with a
// memset of 4 bytes before it. Backward: one kernel. Pointers that are not 16-byte aligned, and sizes that are no
// multiple of a vector, take the same kernel with vectors of one element: codes have a multiple of 8 bits, so both are
// rare, and a tail beside the vectors would cost every thread registers.
//
// Numbers. float32 arithmetic, float64 for float64. At most 16 + 5 + 5 additions are chained in it; the sum over the
// blocks is in float64. NaN gives b = -1, and NaN for the penalty and its gradient; nobody looks for it.
//
// Limits. numel <= 2^31 * 4096, the largest grid.

#include <algorithm>

#include "hashengine/greedy_sign.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace hashengine {
namespace {

constexpr int kThreadElements = 16;
constexpr int kBlockThreads = 256;
constexpr int kLargestBlockThreads = 1024;

int64_t forward_blocks(int64_t numel) {
  if (numel <= kLargestBlockThreads * kThreadElements) return 1;
  return ceil_div<int64_t>(numel, kBlockThreads * kThreadElements);
}

int forward_threads(int64_t numel, int64_t blocks) {
  if (blocks > 1) return kBlockThreads;
  const int64_t warps = ceil_div<int64_t>(numel, kThreadElements * kWarpThreads);
  return static_cast<int>(std::max<int64_t>(warps, 1) * kWarpThreads);
}

// Each warp takes kThreadElements * 32 consecutive elements, so that a thread's vectors lie at constant distances.
struct ThreadTile {
  int64_t begin;      // of the thread's first vector; the next is kWarpThreads vectors further
  int64_t remaining;  // elements from there to the end of the array, <= 0 where the thread has none

  template <int kWidth>
  static __device__ __forceinline__ ThreadTile of(int64_t numel) {
    const unsigned lane = threadIdx.x % kWarpThreads;
    const int64_t warp_first_thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x - lane;
    const int64_t begin = warp_first_thread * kThreadElements + lane * kWidth;
    return {begin, numel - begin};
  }
};

// kWidth divides numel, here and below.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kLargestBlockThreads) forward_kernel(GreedySignForward params, void* workspace) {
  using Real = Arithmetic<T>;
  constexpr int kVectors = kThreadElements / kWidth;
  constexpr int kStride = kWarpThreads * kWidth;
  const ThreadTile tile = ThreadTile::of<kWidth>(params.numel);
  const auto* u = static_cast<const T*>(params.u);
  auto* b = static_cast<T*>(params.b);

  Vector<T, kWidth> vectors[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v)  // every load is under way before the first is used
    if (v * kStride < tile.remaining) vectors[v] = vector_at<kWidth>(u, tile.begin + v * kStride);

  Real thread_total = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (v * kStride >= tile.remaining) break;
    Real vector_total = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Real value = widen(vectors[v].at[i]);
      vectors[v].at[i] = narrow<T>(greedy_sign_code(value));
      vector_total += greedy_sign_penalty(value);
    }
    thread_total += vector_total;
    vector_at<kWidth>(b, tile.begin + v * kStride) = vectors[v];
  }

  const Real block_total = block_sum(thread_total);
  double total = static_cast<double>(block_total);
  const bool writes = gridDim.x == 1 ? threadIdx.x == 0 : grid_sum(block_total, workspace, total);
  // The mean of nothing is NaN, as torch has it.
  if (writes) *static_cast<Real*>(params.penalty) = static_cast<Real>(params.alpha * (total / params.numel));
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kBlockThreads) backward_kernel(GreedySignBackward params, Arithmetic<T> factor) {
  using Real = Arithmetic<T>;
  constexpr int kVectors = kThreadElements / kWidth;
  constexpr int kStride = kWarpThreads * kWidth;
  const ThreadTile tile = ThreadTile::of<kWidth>(params.numel);
  const auto* u = static_cast<const T*>(params.u);
  const auto* grad_b = static_cast<const T*>(params.grad_b);
  auto* grad_u = static_cast<T*>(params.grad_u);
  const auto* grad_penalty = static_cast<const Real*>(params.grad_penalty);
  const Real scale = grad_penalty ? *grad_penalty * factor : Real(0);

  // Zeros stand for what is not read: a gradient of zero, and a u at which the penalty counts as flat.
  Vector<T, kWidth> values[kVectors] = {};
  Vector<T, kWidth> gradients[kVectors] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (v * kStride >= tile.remaining) break;
    if (grad_penalty) values[v] = vector_at<kWidth>(u, tile.begin + v * kStride);
    if (grad_b) gradients[v] = vector_at<kWidth>(grad_b, tile.begin + v * kStride);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (v * kStride >= tile.remaining) break;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Real slope = greedy_sign_penalty_slope(widen(values[v].at[i]));
      gradients[v].at[i] = narrow<T>(widen(gradients[v].at[i]) + scale * slope);
    }
    vector_at<kWidth>(grad_u, tile.begin + v * kStride) = gradients[v];
  }
}

}  // namespace

int64_t greedy_sign_workspace_bytes(int64_t numel) {
  const int64_t blocks = forward_blocks(numel);
  return blocks == 1 ? 0 : grid_sum_workspace_bytes<double>(blocks);
}

void launch_greedy_sign_forward(const GreedySignForward& params, void* workspace, cudaStream_t stream) {
  const int64_t blocks = forward_blocks(params.numel);
  const int threads = forward_threads(params.numel, blocks);
  if (blocks > 1) cudaMemsetAsync(workspace, 0, sizeof(unsigned), stream);
  with_floating_type(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kWidth = kVectorBytes / sizeof(T);
    const bool vectors = params.numel % kWidth == 0 && is_aligned(params.u) && is_aligned(params.b);
    launch(vectors ? forward_kernel<T, kWidth> : forward_kernel<T, 1>, blocks, threads, stream, params, workspace);
  });
}

void launch_greedy_sign_backward(const GreedySignBackward& params, cudaStream_t stream) {
  if (params.numel == 0) return;
  const int64_t blocks = ceil_div<int64_t>(params.numel, kBlockThreads * kThreadElements);
  const double factor = params.alpha * 3.0 / static_cast<double>(params.numel);
  with_floating_type(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kWidth = kVectorBytes / sizeof(T);
    const bool vectors = params.numel % kWidth == 0 && is_aligned(params.u) && is_aligned(params.grad_u) &&
                         is_aligned(params.grad_b);  // null is aligned
    launch(vectors ? backward_kernel<T, kWidth> : backward_kernel<T, 1>, blocks, kBlockThreads, stream, params,
           static_cast<Arithmetic<T>>(factor));
  });
}

}  // namespace hashengine
