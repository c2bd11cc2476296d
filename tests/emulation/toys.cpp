// Toy kernels that test the emulator: correct kernels, which must pass, and kernels with a known mistake, which must be
// detected.

#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include "cuda/common/cluster.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"

using namespace hashengine;

namespace {

constexpr int kThreads = 96;

// Each block reverses its 96 numbers via shared memory.
template <bool kHasBarrier>
__global__ void reverse_kernel(const float* in, float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (kHasBarrier) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// Broadcasts two numbers through one shared variable. Without the second barrier, thread 0 may overwrite the first
// number before another thread has read it. The mistake has no effect if the threads run in descending order.
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

// The block that finishes last sums the numbers of all blocks. If kStoresFirst is false, a block makes a mistake: it
// takes its ticket before it stores its number.
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
    __syncwarp();  // the other lanes of this warp are at the barrier
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

// Reverses and doubles the numbers of a cluster: each block stores its own in dynamic shared memory and reads those of
// the mirrored block, and the factor 2 from that block's static shared memory. If kArrives is true, a barrier before
// the reads ensures that all numbers are stored. If kStays is true, a barrier after the reads ensures that no block
// exits while others read from it.
template <bool kArrives, bool kStays>
__global__ void cluster_reverse_kernel(const float* in, float* out) {
  const auto cluster = cooperative_groups::this_cluster();
  auto* tile = dynamic_shared<float>();
  __shared__ float scale;
  tile[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (threadIdx.x == 0) scale = 2;
  if (kArrives) cluster.sync();
  const int peer = int(cluster.num_blocks() - 1 - cluster.block_rank());
  const float* peer_scale = cluster.map_shared_rank(&scale, peer);
  const float* peer_tile = cluster.map_shared_rank(tile, peer);
  __syncwarp();
  out[blockIdx.x * kThreads + threadIdx.x] = *peer_scale * peer_tile[kThreads - 1 - threadIdx.x];
  if (kStays) cluster.sync();
}

// Each block writes its first number to the shared memory of all blocks of its cluster. A barrier before the writes, or
// its two halves, ensure that all blocks have started, unless kStart is a mistake.
enum class Start { kBarrier, kArriveAndWait, kNothing, kArriveTwice, kWaitAlone, kArriveAlone };

template <Start kStart>
__global__ void cluster_gather_kernel(const float* in, float* out) {
  const auto cluster = cooperative_groups::this_cluster();
  auto* gathered = dynamic_shared<float>();
  if (kStart == Start::kBarrier) cluster.sync();
  if (kStart == Start::kArriveAndWait || kStart == Start::kArriveTwice || kStart == Start::kArriveAlone)
    hashengine::cluster_arrive();
  if (kStart == Start::kArriveTwice) hashengine::cluster_arrive();
  if (kStart == Start::kArriveAndWait || kStart == Start::kWaitAlone) hashengine::cluster_wait();
  if (kStart == Start::kArriveAlone) return;
  if (threadIdx.x < cluster.num_blocks())
    cluster.map_shared_rank(gathered, int(threadIdx.x))[cluster.block_rank()] = in[blockIdx.x * kThreads];
  cluster.sync();
  if (threadIdx.x < cluster.num_blocks()) out[blockIdx.x * kThreads + threadIdx.x] = gathered[threadIdx.x];
}

// A pipeline with two buffers: each round starts the copy of the next numbers; then each thread adds one of the
// current numbers to its sum. All values
// of Copies except kCorrect are mistakes.
enum class Copies { kCorrect, kNotCommitted, kNotWaited, kTooFewWaited, kNoBarrierAfterWait, kNoBarrierBeforeReuse };
template <Copies kCopies>
__global__ void pipeline_kernel(const float* in, float* out, int rounds) {
  alignas(16) __shared__ float buffers[2][kThreads];
  const auto fetch = [&](int round) {
    if (round < rounds && threadIdx.x < kThreads / 4)
      __pipeline_memcpy_async(&buffers[round % 2][4 * threadIdx.x], in + round * kThreads + 4 * threadIdx.x, 16);
    if (kCopies != Copies::kNotCommitted) __pipeline_commit();
  };
  float sum = 0;
  fetch(0);
  for (int round = 0; round < rounds; ++round) {
    fetch(round + 1);
    if (kCopies != Copies::kNotWaited) __pipeline_wait_prior(kCopies == Copies::kTooFewWaited ? 2 : 1);
    if (kCopies != Copies::kNoBarrierAfterWait) __syncthreads();
    sum += buffers[round % 2][kThreads - 1 - threadIdx.x];
    if (kCopies != Copies::kNoBarrierBeforeReuse) __syncthreads();
  }
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// The copy fills the last of every four numbers with zero.
__global__ void zero_fill_kernel(const float* in, float* out) {
  auto* tile = dynamic_shared<float>();
  __pipeline_memcpy_async(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, 16, 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = tile[4 * threadIdx.x + i];
}

__global__ void copy_kernel(const float* in, float* to, int bytes) { __pipeline_memcpy_async(to, in, size_t(bytes)); }
__global__ void copy_unaligned_kernel(const float* in) { __pipeline_memcpy_async(dynamic_shared<float>() + 1, in, 16); }

// Block 0 reads from the shared memory of block 1 after block 1 has exited. It maps the address before the exit, and if
// `maps_late` is true once more after it.
__global__ void exited_peer_kernel(float* out, bool maps_late) {
  const auto cluster = cooperative_groups::this_cluster();
  auto* number = dynamic_shared<float>();
  *number = 1;
  const float* peer_number = cluster.map_shared_rank(number, 1);
  cluster.sync();
  if (cluster.block_rank() == 1) return;
  cluster.sync();  // does not wait for blocks that have exited
  if (maps_late) peer_number = cluster.map_shared_rank(number, 1);
  *out = *peer_number;
}

__global__ void dynamic_overrun_kernel() { dynamic_shared<float>()[threadIdx.x + 1] = 0; }

// Adds one to each number that the previous kernel has written. Without the wait, it may read older numbers.
template <bool kWaits>
__global__ void successor_kernel(const float* in, float* out) {
  if (kWaits) wait_for_previous_kernel();
  out[threadIdx.x] = in[threadIdx.x] + 1;
}

__global__ void overrun_kernel(float* out) { out[threadIdx.x + 1] = 0; }

__global__ void misaligned_kernel(float* out) { vector_at<2>(out + 1, 0) = {}; }

}  // namespace

extern "C" {

void toy_reverse(const float* in, float* out, int blocks, bool correct) {
  launch(correct ? reverse_kernel<true> : reverse_kernel<false>, blocks, kThreads, nullptr, in, out);
}
void toy_broadcast_twice(const float* in, float* out, int blocks, bool correct) {
  launch(correct ? broadcast_twice_kernel<true> : broadcast_twice_kernel<false>, blocks, kThreads, nullptr, in, out);
}
void toy_last_block(const float* in, float* out, int blocks, bool correct, float* stored, unsigned* tickets) {
  launch(correct ? last_block_kernel<true> : last_block_kernel<false>, blocks, kThreads, nullptr, in, out, stored,
         tickets);
}
void toy_warp(unsigned* out, int blocks) { launch(warp_kernel, blocks, 32, nullptr, out); }
void toy_cluster_reverse(const float* in, float* out, int blocks, int cluster, bool arrives, bool stays) {
  const auto kernel = arrives ? (stays ? cluster_reverse_kernel<true, true> : cluster_reverse_kernel<true, false>)
                              : cluster_reverse_kernel<false, true>;
  launch(kernel, {blocks, kThreads, kThreads * sizeof(float), cluster}, nullptr, in, out);
}
void toy_cluster_gather(const float* in, float* out, int blocks, int cluster, int start) {
  constexpr decltype(&cluster_gather_kernel<Start::kBarrier>) kKernels[] = {
      cluster_gather_kernel<Start::kBarrier>,   cluster_gather_kernel<Start::kArriveAndWait>,
      cluster_gather_kernel<Start::kNothing>,   cluster_gather_kernel<Start::kArriveTwice>,
      cluster_gather_kernel<Start::kWaitAlone>, cluster_gather_kernel<Start::kArriveAlone>};
  launch(kKernels[start], {blocks, kThreads, int64_t(cluster * sizeof(float)), cluster}, nullptr, in, out);
}
void toy_pipeline(const float* in, float* out, int blocks, int rounds, int copies) {
  const auto kernels = {pipeline_kernel<Copies::kCorrect>,
                        pipeline_kernel<Copies::kNotCommitted>,
                        pipeline_kernel<Copies::kNotWaited>,
                        pipeline_kernel<Copies::kTooFewWaited>,
                        pipeline_kernel<Copies::kNoBarrierAfterWait>,
                        pipeline_kernel<Copies::kNoBarrierBeforeReuse>};
  launch(kernels.begin()[copies], blocks, kThreads, nullptr, in, out, rounds);
}
void toy_zero_fill(const float* in, float* out) { launch(zero_fill_kernel, {1, 32, 512}, nullptr, in, out); }
void toy_copy(const float* in, float* to, int bytes) { launch(copy_kernel, 1, 1, nullptr, in, to, bytes); }
void toy_copy_unaligned(const float* in) { launch(copy_unaligned_kernel, {1, 1, 64}, nullptr, in); }
void toy_exited_peer(float* out, bool maps_late) { launch(exited_peer_kernel, {2, 1, 4, 2}, nullptr, out, maps_late); }
void toy_dynamic_shared(int bytes) { launch(divergent_kernel, {1, 32, bytes}, nullptr); }
void toy_shared_not_requested() {
  cudaLaunchConfig_t config{};
  config.dynamicSmemBytes = 64 << 10;
  cudaLaunchKernelEx(&config, foreign_mask_kernel);
}
void toy_dynamic_overrun() { launch(dynamic_overrun_kernel, {1, 32, 32 * sizeof(float)}, nullptr); }
void toy_foreign_mask() { launch(foreign_mask_kernel, 1, 32, nullptr); }
void toy_absent_lane() { launch(absent_lane_kernel, 1, 32, nullptr); }
void toy_divergent() { launch(divergent_kernel, 1, 64, nullptr); }
void toy_mixed_operations() { launch(mixed_operations_kernel, 1, 32, nullptr); }
void toy_too_many_threads() { launch(divergent_kernel, 1, 1056, nullptr); }
// Three kernels in a row: each adds one to the numbers of the previous one. stored: memory for two results.
void toy_successors(const float* in, float* out, bool correct, float* stored) {
  const auto kernel = correct ? successor_kernel<true> : successor_kernel<false>;
  const LaunchShape early{1, kThreads, 0, 1, true};
  launch(kernel, 1, kThreads, nullptr, in, stored);
  launch(kernel, early, nullptr, stored, stored + kThreads);
  launch(kernel, early, nullptr, stored + kThreads, out);
}
void toy_misaligned(float* out) { launch(misaligned_kernel, 1, 32, nullptr, out); }
void toy_overrun(float* out, int threads) { launch(overrun_kernel, 1, threads, nullptr, out); }

uint16_t to_half(float value) { return __float2half_rn(value).bits; }
float from_half(uint16_t bits) { return __half2float({bits}); }
uint16_t to_bfloat16(float value) { return __float2bfloat16_rn(value).bits; }

}  // extern "C"
