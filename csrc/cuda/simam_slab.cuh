// A thread's place in a slab (simam_launch.h), and sums over the threads of a slab.
#pragma once

#include "cluster.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "simam.cuh"
#include "simam_launch.h"

namespace hashengine {

// One block of 512 threads, or two of 256, leave each thread 128 registers.
#define HE_SLAB_BOUNDS(Held)                                          \
  __launch_bounds__(simam_block_threads(Held::kLayout, Held::kWidth), \
                    512 / simam_block_threads(Held::kLayout, Held::kWidth))

// NCHW has one column, known to the compiler.
template <FeatureLayout kLayout>
__device__ __forceinline__ int slab_columns_log2(const SimamSlabs& slabs) {
  return kLayout == FeatureLayout::kContiguous ? 0 : slabs.columns_log2;
}

// What one thread holds of its block's part.
template <typename Held>
struct SlabPlace : HeldPlace {
  int64_t channel;  // of the first held, among all samples'
  unsigned slab, part;
  int rows;    // of the part
  bool leads;  // the first of the part's threads that hold these channels

  __device__ __forceinline__ SlabPlace(const SimamSlabs& slabs, unsigned block) {
    const int columns_log2 = slab_columns_log2<Held::kLayout>(slabs);
    slab = slabs.parts == 1 ? block : block / slabs.parts;
    part = block - slab * slabs.parts;
    const int column = threadIdx.x & ((1 << columns_log2) - 1);
    const int row = threadIdx.x >> columns_log2;
    const int row_step = blockDim.x >> columns_log2;
    const int64_t first_row = static_cast<int64_t>(part) * slabs.part_rows;
    const int64_t rows_left = slabs.rows - first_row;
    rows = rows_left < slabs.part_rows ? static_cast<int>(rows_left) : slabs.part_rows;

    begin = (first_row + row) * slabs.row_stride + column * Held::kWidth;
    stride = row_step * slabs.row_stride;
    count = 0;
#pragma unroll
    for (int v = 0; v < Held::kVectors; ++v) count += row + v * row_step < rows;
    leads = row == 0;
    if constexpr (Held::kLayout == FeatureLayout::kContiguous) {
      begin += slab * slabs.slab_stride;
      channel = slab;
    } else {
      const unsigned sample = slab / slabs.per_sample;
      const int64_t slab_in_sample = slab - sample * slabs.per_sample;
      const int64_t channel_in_sample = slab_in_sample * slabs.slab_channels + column * Held::kWidth;
      begin += sample * slabs.sample_stride + slab_in_sample * slabs.slab_stride;
      channel = sample * slabs.channels + channel_in_sample;
      if (channel_in_sample >= slabs.channels) {
        channel = 0;  // where statistics may be read as well as anywhere
        count = 0;
        leads = false;
      }
    }
  }
};

// Values of shared memory that one call of slab_sums wants, which adds up `sums` values a thread in clusters of
// `blocks`.
inline int64_t slab_scratch_values(const SimamSlabs& slabs, int sums, int64_t blocks) {
  const int64_t columns = int64_t{1} << slabs.columns_log2;
  const int64_t rows = slabs.threads / (columns < kWarpThreads ? kWarpThreads : columns);
  return (rows + blocks + 1) * columns * sums;
}

// Sums over the threads of a cluster that hold the same column, the same in each, in a fixed order: over lanes, then,
// with a thread for each sum, over the block in shared memory, and over the blocks, which tell each other what they
// found. Each call wants a `scratch` of its own, which spares barriers; all blocks of the cluster must have begun.
template <FeatureLayout kLayout, typename Real, int kSums>
__device__ __forceinline__ void slab_sums(const SimamSlabs& slabs, Real* scratch, Real (&sums)[kSums]) {
  constexpr int kAtOnce = kSums * sizeof(Real) % kVectorBytes == 0 ? kVectorBytes / sizeof(Real) : 1;
  const int columns_log2 = slab_columns_log2<kLayout>(slabs);
  const int columns = 1 << columns_log2;
  const int column = threadIdx.x & (columns - 1);
  for (int distance = kWarpThreads / 2; distance >= columns; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], distance);
  }

  // A row is what a warp, or in wider slabs the threads of one row, have to say: values for each column.
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
    for (int i = 0; i < kSums; i += kAtOnce) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) vector_at<kAtOnce>(mine, i).at[j] = sums[i + j];
    }
  }
  __syncthreads();

  const int blocks = cluster_blocks();
  if (blocks > 1) {
    Real* exchange = totals + values;
    for (int value = threadIdx.x; value < values; value += blockDim.x) {
      const Real total = total_of(value);
      for (int peer = 0; peer < blocks; ++peer) map_to_rank(exchange, peer)[cluster_rank() * values + value] = total;
    }
    cluster_sync();
    from = exchange;
    rows = blocks;
  }
  for (int value = threadIdx.x; value < values; value += blockDim.x) totals[value] = total_of(value);
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kSums; i += kAtOnce) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) sums[i + j] = vector_at<kAtOnce>(totals, column * kSums + i).at[j];
  }
}

// Calls function(Held()) with what the slabs are to be held in. Element by element the layouts do not differ: one
// column of NHWC is a plane of NCHW.
template <typename Function>
void with_held(const SimamShape& shape, int width, Function function) {
  with_floating_type(shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (kFullWidth<T> > 1) {
      if (width > 1 && shape.layout == FeatureLayout::kContiguous)
        return function(Held<T, kFullWidth<T>, FeatureLayout::kContiguous>());
      if (width > 1) return function(Held<T, kFullWidth<T>, FeatureLayout::kChannelsLast>());
    }
    function(Held<T, 1, FeatureLayout::kChannelsLast>());
  });
}

}  // namespace hashengine
