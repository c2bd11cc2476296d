// Kernels with known mistakes, and their right twins: what the emulator must catch, and what it must let pass.

#include "launch.cuh"
#include "reduce.cuh"

using namespace hashengine;

namespace {

constexpr int kThreads = 96;

// Each block reverses its 96 numbers through shared memory.
template <bool kHasBarrier>
__global__ void reverse_kernel(const float* in, float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (kHasBarrier) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// Two rounds through one shared number: without the second barrier a fast thread overwrites what a slow one has yet to
// read. Right by luck when the threads run in order.
template <bool kHasBarrier>
__global__ void broadcast_twice_kernel(const float* in, float* out) {
  __shared__ float first;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) first = in[round];
    __syncthreads();
    sum += first;
    if (kHasBarrier) __syncthreads();
  }
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// The sum of each block's number, by the block that comes last. Taking the ticket before storing is the mistake.
template <bool kStoresFirst>
__global__ void last_block_kernel(const float* in, float* out, float* stored, unsigned* tickets) {
  if (threadIdx.x != 0) return;
  if (kStoresFirst) stored[blockIdx.x] = in[blockIdx.x];
  const bool is_last = atomicAdd(tickets, 1u) == gridDim.x - 1;
  if (!kStoresFirst) stored[blockIdx.x] = in[blockIdx.x];
  if (!is_last) return;
  *out = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) *out += stored[i];
}

// Votes and shuffles of whole warps and of disjoint halves.
__global__ void warp_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  unsigned* mine = out + 8 * (blockIdx.x * blockDim.x + threadIdx.x);
  mine[0] = __ballot_sync(kWholeWarp, lane % 3 == 0);
  mine[1] = __shfl_down_sync(kWholeWarp, lane, 5u);
  mine[2] = __shfl_sync(kWholeWarp, lane, 7);
  mine[3] = unsigned(__all_sync(half, lane < 16));
  mine[4] = unsigned(__any_sync(half, lane == 20));
  mine[5] = __shfl_xor_sync(half, lane, 3);
  __syncwarp();
  mine[6] = warp_sum(lane);
  mine[7] = blockIdx.x;
}

__global__ void foreign_mask_kernel() { __ballot_sync(1u, 1); }

__global__ void absent_lane_kernel() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}

__global__ void divergent_kernel() {
  if (threadIdx.x < 32) {
    __syncwarp();
  } else if (threadIdx.x == 32) {
    __syncwarp();  // the rest of this warp waits at the barrier
  }
  __syncthreads();
}

__global__ void mixed_operations_kernel() {
  if (threadIdx.x % 2) {
    __ballot_sync(kWholeWarp, 1);
  } else {
    __syncwarp();
  }
}

__global__ void overrun_kernel(float* out) { out[threadIdx.x + 1] = 0; }

}  // namespace

extern "C" {

void toy_reverse(const float* in, float* out, int blocks, bool right) {
  launch(right ? reverse_kernel<true> : reverse_kernel<false>, blocks, kThreads, nullptr, in, out);
}
void toy_broadcast_twice(const float* in, float* out, int blocks, bool right) {
  launch(right ? broadcast_twice_kernel<true> : broadcast_twice_kernel<false>, blocks, kThreads, nullptr, in, out);
}
void toy_last_block(const float* in, float* out, int blocks, bool right, float* stored, unsigned* tickets) {
  launch(right ? last_block_kernel<true> : last_block_kernel<false>, blocks, kThreads, nullptr, in, out, stored,
         tickets);
}
void toy_warp(unsigned* out, int blocks) { launch(warp_kernel, blocks, 32, nullptr, out); }
void toy_foreign_mask() { launch(foreign_mask_kernel, 1, 32, nullptr); }
void toy_absent_lane() { launch(absent_lane_kernel, 1, 32, nullptr); }
void toy_divergent() { launch(divergent_kernel, 1, 64, nullptr); }
void toy_mixed_operations() { launch(mixed_operations_kernel, 1, 32, nullptr); }
void toy_too_many_threads() { launch(divergent_kernel, 1, 1056, nullptr); }
void toy_overrun(float* out, int threads) { launch(overrun_kernel, 1, threads, nullptr, out); }

uint16_t to_half(float value) { return __float2half_rn(value).bits; }
float from_half(uint16_t bits) { return __half2float({bits}); }
uint16_t to_bfloat16(float value) { return __float2bfloat16_rn(value).bits; }

}  // extern "C"
