// greedy_sign on the GPU: b = +1 if u >= 0, otherwise -1; penalty = alpha * mean(||u| - 1|^3); and the backward.
//
// Idea. Elementwise work is limited by memory. Every array is therefore moved once, 128 bits per instruction, and the
// penalty is computed in the same pass. Each thread sums its elements, each block sums over its threads, and the block
// that finishes last sums over the blocks. There are no atomics on floats: the same input gives the same bits in every
// run. A batch of up to 16,384 elements (256 codes of 64 bits) takes a single block. It needs no count of finished
// blocks, and therefore no memset.
//
// Traffic, for N elements of s bytes. Forward: reads u, writes b: 2Ns, the floor; the sums of the blocks add at most 16
// bytes per 4,096 elements. Backward: reads grad_b and u, writes grad_u: 3Ns, the floor; a null gradient saves one read
// (2Ns).
//
// Launch. 256 threads per block (32 to 1,024 if the forward has a single block) and 16 elements per thread. A thread
// has 32 bytes per array in flight for half precision, 128 for float64. Each block processes one tile, so the hardware
// balances the load. Forward: one kernel, preceded by a memset of 4 bytes if there are several blocks. Backward: one
// kernel. If a pointer is not aligned to 16 bytes, or if the number of elements is not a multiple of the vector width,
// the same kernel runs with vectors of one element. The second case is rare, because codes have a multiple of 8 bits. A
// separate loop for the last elements would take registers in every thread, so there is none.
//
// Numerics. Arithmetic in float32 (float64 for float64). A value passes through at most 16 additions in a thread, 5 in
// a warp and 5 in a block; the sum over the blocks is in float64. NaN gives b = -1, and NaN as penalty and gradient;
// the kernel does not report it.
//
// Limits. numel <= (2^31 - 1) * 4096: the largest number of blocks, times the elements per block.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "hashengine/greedy_sign.h"

namespace hashengine {
namespace {

constexpr int kThreadElements = 16;
constexpr int kBlockThreads = 256;
constexpr int kMaxBlockThreads = 1024;

int64_t forward_blocks(int64_t numel) {
  if (numel <= kMaxBlockThreads * kThreadElements) return 1;
  return ceil_div<int64_t>(numel, kBlockThreads * kThreadElements);
}

int forward_threads(int64_t numel, int64_t blocks) {
  if (blocks > 1) return kBlockThreads;
  const int64_t warps = ceil_div<int64_t>(numel, kThreadElements * kWarpThreads);
  return static_cast<int>(std::max<int64_t>(warps, 1) * kWarpThreads);
}

// The elements of a thread. A warp processes kThreadElements * kWarpThreads consecutive elements. Consecutive vectors
// of a thread are therefore kWarpThreads vectors apart.
struct ThreadTile {
  int64_t begin;      // the first element of the thread's first vector
  int64_t remaining;  // the number of elements from `begin` to the end of the array; <= 0 if the thread has none

  template <int kWidth>
  static __device__ __forceinline__ ThreadTile of(int64_t numel) {
    const unsigned lane = threadIdx.x % kWarpThreads;
    const int64_t warp_first_thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x - lane;
    const int64_t begin = warp_first_thread * kThreadElements + lane * kWidth;
    return {begin, numel - begin};
  }
};

// In both kernels, numel must be a multiple of kWidth.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kMaxBlockThreads) forward_kernel(GreedySignForward params, void* workspace) {
  using Real = Arithmetic<T>;
  constexpr int kVectors = kThreadElements / kWidth;
  constexpr int kStride = kWarpThreads * kWidth;
  const ThreadTile tile = ThreadTile::of<kWidth>(params.numel);
  const auto* u = static_cast<const T*>(params.u);
  auto* b = static_cast<T*>(params.b);

  Vector<T, kWidth> vectors[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v)  // issues all loads before the first use
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
  // The mean of an empty tensor is NaN, as in torch.
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

  // If grad_b is null, `gradients` stays zero. If grad_penalty is null, u is not read and `values` stays zero.
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
    const bool uses_vectors = params.numel % kWidth == 0 && is_aligned(params.u) && is_aligned(params.b);
    launch(uses_vectors ? forward_kernel<T, kWidth> : forward_kernel<T, 1>, blocks, threads, stream, params, workspace);
  });
}

void launch_greedy_sign_backward(const GreedySignBackward& params, cudaStream_t stream) {
  if (params.numel == 0) return;
  const int64_t blocks = ceil_div<int64_t>(params.numel, kBlockThreads * kThreadElements);
  const double factor = params.alpha * 3.0 / static_cast<double>(params.numel);
  with_floating_type(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kWidth = kVectorBytes / sizeof(T);
    const bool uses_vectors = params.numel % kWidth == 0 && is_aligned(params.u) && is_aligned(params.grad_u) &&
                              is_aligned(params.grad_b);  // a null pointer counts as aligned
    launch(uses_vectors ? backward_kernel<T, kWidth> : backward_kernel<T, 1>, blocks, kBlockThreads, stream, params,
           static_cast<Arithmetic<T>>(factor));
  });
}

}  // namespace hashengine
