// A thread's fragment of a slab (plan.h), and sums over the threads of a slab.
#pragma once

#include "cuda/common/cluster.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/simam/fragment.cuh"
#include "cuda/simam/plan.h"

namespace hashengine::simam {

// A multiprocessor that runs one block of 512 threads, or two of 256, has 128 registers for each thread.
#define HE_SLAB_BOUNDS(Fragment)                                            \
  __launch_bounds__(max_block_threads(Fragment::kLayout, Fragment::kWidth), \
                    512 / max_block_threads(Fragment::kLayout, Fragment::kWidth))

// If the layout is contiguous, the result is a compile-time constant, because a slab has one column. Single elements
// use the layout channels_last (with_fragment).
template <FeatureLayout kLayout>
__device__ __forceinline__ int slab_columns_log2(const SlabPlan& plan) {
  return kLayout == FeatureLayout::kContiguous ? 0 : plan.columns_log2;
}

// The place of a thread's fragment in its block's part of a slab.
template <typename Fragment>
struct SlabPlace : FragmentPlace {
  int64_t channel;  // the first channel of the fragment, counted over all samples
  unsigned slab, part;
  int rows;        // of the part
  bool is_leader;  // whether this is the first of the part's threads with these channels

  __device__ __forceinline__ SlabPlace(const SlabPlan& plan, unsigned block) {
    const int columns_log2 = slab_columns_log2<Fragment::kLayout>(plan);
    slab = plan.parts == 1 ? block : block / plan.parts;
    part = block - slab * plan.parts;
    const int column = threadIdx.x & ((1 << columns_log2) - 1);
    const int row = threadIdx.x >> columns_log2;
    const int row_step = blockDim.x >> columns_log2;
    const int64_t first_row = static_cast<int64_t>(part) * plan.part_rows;
    const int64_t rows_left = plan.rows - first_row;
    rows = rows_left < plan.part_rows ? static_cast<int>(rows_left) : plan.part_rows;

    begin = (first_row + row) * plan.row_stride + column * Fragment::kWidth;
    stride = row_step * plan.row_stride;
    count = 0;
#pragma unroll
    for (int v = 0; v < Fragment::kVectors; ++v) count += row + v * row_step < rows;
    is_leader = row == 0;
    if constexpr (Fragment::kLayout == FeatureLayout::kContiguous) {
      begin += slab * plan.slab_stride;
      channel = slab;
    } else {
      const unsigned sample = slab / plan.slabs_per_sample;
      const int64_t slab_in_sample = slab - sample * plan.slabs_per_sample;
      const int64_t channel_in_sample = slab_in_sample * plan.slab_channels + column * Fragment::kWidth;
      begin += sample * plan.sample_stride + slab_in_sample * plan.slab_stride;
      channel = sample * plan.channels + channel_in_sample;
      if (channel_in_sample >= plan.channels) {
        channel = 0;  // a valid address for loads whose result is not used
        count = 0;
        is_leader = false;
      }
    }
  }
};

// The number of values of shared memory that one call of slab_sums needs, for `sums` sums per thread and clusters of
// `blocks` blocks.
inline int64_t slab_scratch_values(const SlabPlan& plan, int sums, int64_t blocks) {
  const int64_t columns = int64_t{1} << plan.columns_log2;
  const int64_t rows = plan.threads / (columns < kWarpThreads ? kWarpThreads : columns);
  return (rows + blocks + 1) * columns * sums;
}

// Sums over the threads of a cluster that hold the same column. Each of these threads gets the result. The order of the
// additions is fixed: first over the lanes of a warp, then over the block in shared memory with one thread per sum,
// then over the blocks, which write their totals to each other. Each call in a kernel needs its own `scratch`, so that
// no barrier is needed between the calls. All blocks of the cluster must have started.
template <FeatureLayout kLayout, typename Real, int kSums>
__device__ __forceinline__ void slab_sums(const SlabPlan& plan, Real* scratch, Real (&sums)[kSums]) {
  constexpr int kSumsPerStore = kSums * sizeof(Real) % kVectorBytes == 0 ? kVectorBytes / sizeof(Real) : 1;
  const int columns_log2 = slab_columns_log2<kLayout>(plan);
  const int columns = 1 << columns_log2;
  const int column = threadIdx.x & (columns - 1);
  for (int distance = kWarpThreads / 2; distance >= columns; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], distance);
  }

  // A row of scratch holds the sums of one warp, or of one slab row if a slab row has more threads than a warp. It has
  // kSums values per column.
  const int values = columns * kSums;
  const int row_log2 = columns_log2 < 5 ? 5 : columns_log2;
  const int thread_in_row = threadIdx.x & ((1 << row_log2) - 1);
  int rows = blockDim.x >> row_log2;
  Real* from = scratch;
  Real* totals = scratch + rows * values;
  const auto total_of = [&](int value) {
    Real total = 0;
#pragma unroll 4
    for (int row = 0; row < rows; ++row) total += from[row * values + value];
    return total;
  };
  if (thread_in_row < columns) {
    Real* mine = from + (threadIdx.x >> row_log2) * values + column * kSums;
#pragma unroll
    for (int i = 0; i < kSums; i += kSumsPerStore) {
#pragma unroll
      for (int j = 0; j < kSumsPerStore; ++j) vector_at<kSumsPerStore>(mine, i).at[j] = sums[i + j];
    }
  }
  __syncthreads();

  const int blocks = cluster_blocks();
  if (blocks > 1) {
    Real* block_totals = totals + values;  // [blocks][values]
    for (int value = threadIdx.x; value < values; value += blockDim.x) {
      const Real total = total_of(value);
      for (int peer = 0; peer < blocks; ++peer)
        map_to_rank(block_totals, peer)[cluster_rank() * values + value] = total;
    }
    cluster_sync();
    from = block_totals;
    rows = blocks;
  }
  for (int value = threadIdx.x; value < values; value += blockDim.x) totals[value] = total_of(value);
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kSums; i += kSumsPerStore) {
#pragma unroll
    for (int j = 0; j < kSumsPerStore; ++j) sums[i + j] = vector_at<kSumsPerStore>(totals, column * kSums + i).at[j];
  }
}

// Calls function(Fragment()) with the fragment type for a slab. For single elements one type serves both layouts: a
// plane of NCHW is one column of NHWC.
template <typename Function>
void with_fragment(const SimamShape& shape, int width, Function function) {
  with_floating_type(shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (kFullWidth<T> > 1) {
      if (width > 1 && shape.layout == FeatureLayout::kContiguous)
        return function(Fragment<T, kFullWidth<T>, FeatureLayout::kContiguous>());
      if (width > 1) return function(Fragment<T, kFullWidth<T>, FeatureLayout::kChannelsLast>());
    }
    function(Fragment<T, 1, FeatureLayout::kChannelsLast>());
  });
}

}  // namespace hashengine::simam
