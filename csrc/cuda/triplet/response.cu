// The responses of triplet_attention, for all branches in one launch. A response is the convolution of the pooled maps
// of a branch, from 2 channels to 1. In training the launch also computes the batch statistics of the responses.
//
// Idea. A block loads a tile of the maximum and of the mean, with its border, into shared memory, line by line along
// the contiguous axis of the map. If the reduce pass (reduce.cu) left a map in parts, the block merges them. For a
// backward, it also stores the tile without the border in `pooled`. A thread computes 8 results in each of two columns.
// For a kernel_size of 7 and each channel, 56 loads of two values and 49 of a weight serve 784 multiplications. In
// training each block stores the mean of its results and their sum of squared deviations. The block that finishes last
// merges the statistics of all blocks in a fixed order, in float64, with one warp per branch.
//
// Traffic. Maps only: per value of a map, 2 Reals read and 1 to 3 written. For samples of 56 x 56 x 56 elements, the
// maps have about 5% as many values as x. Most of this traffic stays in L2.
//
// Instructions. In training with samples of 256 x 56 x 56 in NCHW, the kernel executes about 221 per value of the CW
// map, 222 of the HC map and 327 of the HW map, which it merges from 5 parts. For a kernel_size of 7, 98 of them are
// the multiplications of the convolution.
//
// Launch. 256 threads per block, of which two blocks fit into the registers of a multiprocessor. For a kernel_size of
// 7, a block has tiles of up to 64 columns, or of up to 256 rows in narrow maps, and up to 58 KB of shared memory (80
// KB for float64). A larger kernel_size takes up to 80 KB and, if that is not enough, smaller tiles. The statistics
// need a memset of 4 bytes before the launch.
//
// Numerics. Sums in Real; the statistics of the blocks are merged in float64. The statistics of a block take two passes
// over its results, which are in registers.
//
// Limits. kernel_size is at most kTripletLargestCudaKernel. At this size in float64, the smallest tile (8 x 1 values,
// one thread) with its border takes 94 KB in response_backward.cu.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/triplet/passes.h"

namespace hashengine::triplet {
namespace {

constexpr int kThreads = MapTiling::kThreads;
constexpr int kRows = MapTiling::kRows;
constexpr int kColumns = kResponseColumns;

struct BlockStatistics {
  double mean;
  double deviations;  // the sum of the squared deviations from the mean
  double count;
};

// The arrays in Response::workspace.
struct StatisticsWorkspace {
  unsigned* finished_blocks;
  BlockStatistics* blocks;
  explicit HE_HOST_DEVICE StatisticsWorkspace(void* workspace)
      : finished_blocks(static_cast<unsigned*>(workspace)),
        blocks(reinterpret_cast<BlockStatistics*>(static_cast<char*>(workspace) + kGridSumHeaderBytes)) {}
};

// Loads the maximum and the mean of the tile with its border into `planes`, where they are inside the map. Merges the
// parts of the map. kByColumns: whether the columns of the map are contiguous in memory, otherwise its rows are.
template <bool kByColumns, typename Real>
__device__ __forceinline__ void load_tile(const MapTile<Real>& tile, int kernel_size, Real* planes) {
  const BranchMap<Real>& map = tile.map;
  const int area = map.tiling.area(kernel_size);
  const Real* sample = map.source_at(tile.sample, 0, 0);
  const Real* const arrays[] = {sample, sample + map.source.channel_stride};
  BorderLines<kByColumns>(tile, kernel_size)
      .visit(arrays, kByColumns ? map.column_stride : map.row_stride,
             [&](int at, int64_t offset, const Vector<Real, 2>& pooled) {
               Real largest = pooled.at[0], mean = pooled.at[1];
               if (map.source.parts > 1) {
                 const Real* source = sample + offset;
#pragma unroll 2
                 for (int part = 1; part < map.source.parts; ++part) {
                   source += map.source.part_stride;
                   largest = maximum(largest, source[0]);
                   mean += source[map.source.channel_stride];
                 }
               }
               planes[at] = largest;
               planes[area + at] = mean;
             });
}

// Stores the thread's results. If the maps are saved for the backward, also stores the thread's values in `pooled`,
// unless they are there already, and initializes the indices of maps with shares_index.
template <typename Real>
__device__ __forceinline__ void store_results(const Response<Real>& params, const MapTile<Real>& tile,
                                              const Real (&results)[kColumns][kRows], const Real* planes) {
  const BranchMap<Real>& map = tile.map;
  const int border = params.maps.kernel_size / 2;
  const int pitch = map.tiling.pitch(params.maps.kernel_size), area = map.tiling.area(params.maps.kernel_size);
  const Real* own = planes + (tile.thread_group * kRows + border) * pitch + tile.thread_column + border;
  const int64_t begin = map.flat_begin + tile.sample * map.numel() + tile.offset(0);
  const bool has_second = tile.has(0, 1);
  Real* response = params.response + begin;
  Real* saved =
      params.pooled && !map.is_saved ? params.pooled + begin + map.flat_begin + tile.sample * map.numel() : nullptr;
  int32_t* index = params.index && map.shares_index ? params.index + begin : nullptr;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (!tile.has(r)) break;
    const int64_t offset = r * map.columns;
    store_pair(response + offset, results[0][r], results[1][r], has_second);
    if (saved) {
      const Real* largest = own + r * pitch;
      store_pair(saved + offset, largest[0], largest[1], has_second);
      store_pair(saved + offset + map.numel(), largest[area], largest[area + 1], has_second);
    }
    if (index) store_pair(index + offset, kNoIndex, kNoIndex, has_second);
  }
}

// Stores the statistics of the block's results. All threads of the block must call it.
template <typename Real>
__device__ __forceinline__ void store_statistics(const Real (&results)[kColumns][kRows], const MapTile<Real>& tile,
                                                 BlockStatistics* statistics) {
  __shared__ Real block_mean;
  const MapTiling& tiling = tile.map.tiling;
  const int64_t rows = min(tile.map.rows - tile.row, static_cast<int64_t>(tiling.rows()));
  const int64_t columns = min(tile.map.columns - tile.column, static_cast<int64_t>(tiling.columns));
  const Real count = static_cast<Real>(rows * columns);
  Real row_sums[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    row_sums[r] = tile.has(r, 0) ? results[0][r] : Real(0);
#pragma unroll
    for (int c = 1; c < kColumns; ++c)
      if (tile.has(r, c)) row_sums[r] += results[c][r];
  }
#pragma unroll
  for (int half = kRows / 2; half > 0; half /= 2) {
#pragma unroll
    for (int r = 0; r < half; ++r) row_sums[r] += row_sums[r + half];
  }
  const Real sum = block_sum(row_sums[0]);
  if (threadIdx.x == 0) block_mean = sum / count;
  __syncthreads();
  const Real mean = block_mean;
  Real deviations = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (tile.has(r, c)) deviations += (results[c][r] - mean) * (results[c][r] - mean);
  }
  deviations = block_sum(deviations);
  // The deviations are from the rounded mean. This adds at most the square of its rounding error per value.
  if (threadIdx.x == 0) *statistics = {static_cast<double>(sum) / static_cast<double>(count), deviations, count};
}

// Computes the mean and the variance of each branch from the statistics of all blocks, with one warp per branch. Only
// the block that finishes last calls it.
//
// One pass, with the moments about the mean of the branch's first block. Let n values have the sum of squared
// deviations D, and let m of them be in the first block. The mean of the block is at most sqrt(D / m) from the mean of
// all values, because the deviations of the block's values from the latter contribute to D. The difference that gives D
// therefore subtracts at most D n / m from D (1 + n / m), and its relative error is about n / m roundings of float64.
template <typename Real>
__device__ __forceinline__ void merge_statistics(const Response<Real>& params, const BlockStatistics* blocks) {
  const int branch = static_cast<int>(threadIdx.x) / kWarpThreads, lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  if (branch >= params.maps.branches) return;
  int64_t begin = 0, end = gridDim.x, values = 0;
#pragma unroll
  for (int b = 0; b < kTripletBranches; ++b) {
    if (b == branch) begin = params.maps.branch[b].tiling.first_block;
    if (b == branch) values = params.maps.branch[b].numel() * params.maps.samples;
    if (b == branch + 1 && b < params.maps.branches) end = params.maps.branch[b].tiling.first_block;
  }
  const double origin = __ldcg(&blocks[begin].mean);
  double sum = 0, squares = 0;  // about the origin
#pragma unroll 4
  for (int64_t block = begin + lane; block < end; block += kWarpThreads) {
    const double distance = __ldcg(&blocks[block].mean) - origin, count = __ldcg(&blocks[block].count);
    sum += count * distance;
    squares += __ldcg(&blocks[block].deviations) + count * distance * distance;
  }
  sum = warp_sum(sum);
  squares = warp_sum(squares);
  if (lane != 0) return;
  const double distance = sum / static_cast<double>(values);
  params.mean[branch] = static_cast<Real>(origin + distance);
  params.var[branch] = static_cast<Real>((squares - sum * distance) / static_cast<double>(values));
}

template <typename Real>
__device__ __forceinline__ void copy_running_statistics(const Response<Real>& params) {
#pragma unroll
  for (int branch = 0; branch < kTripletBranches; ++branch) {
    if (branch >= params.maps.branches) break;
    params.mean[branch] = *params.running_mean[branch];
    params.var[branch] = *params.running_var[branch];
  }
}

template <typename Real, int kSize>
__global__ void __launch_bounds__(kThreads, 2) response_kernel(Response<Real> params) {
  if (!params.training && blockIdx.x == 0 && threadIdx.x == 0) copy_running_statistics(params);
  if (params.maps.samples == 0) return;
  Real* planes = dynamic_shared<Real>();
  const MapTile<Real> tile(params.maps);
  const int size = kSize > 0 ? kSize : params.maps.kernel_size;
  const int pitch = tile.map.tiling.pitch(size), area = tile.map.tiling.area(size);
  Real* weights = planes + 2 * area;
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * size * size; i += kThreads) weights[i] = tile.map.conv_weight[i];
  fill_with_zeros(planes, 2 * area);
  __syncthreads();
  if (tile.map.column_stride == 1) {
    load_tile<false>(tile, size, planes);
  } else {
    load_tile<true>(tile, size, planes);
  }
  __syncthreads();

  Real results[kColumns][kRows] = {};
  if (tile.has(0)) {
    const Real* window = planes + tile.thread_group * kRows * pitch + tile.thread_column;
#pragma unroll 1
    for (int channel = 0; channel < 2; ++channel)
      correlate<kSize>(results, window + channel * area, pitch, weights + channel * size * size, size);
    store_results(params, tile, results, planes);
  }
  if (!params.training) return;
  const StatisticsWorkspace workspace(params.workspace);
  store_statistics(results, tile, &workspace.blocks[blockIdx.x]);
  if (finishes_last(workspace.finished_blocks)) merge_statistics(params, workspace.blocks);
}

}  // namespace

template <typename Real>
int64_t response_workspace_bytes(const BranchMaps<Real>& maps) {
  return kGridSumHeaderBytes + maps.blocks() * static_cast<int64_t>(sizeof(BlockStatistics));
}

template <typename Real>
void launch_response(const Response<Real>& params, cudaStream_t stream) {
  if (params.training) cudaMemsetAsync(params.workspace, 0, sizeof(unsigned), stream);
  const int64_t bytes = params.maps.shared_values(2) * static_cast<int64_t>(sizeof(Real));
  launch(params.maps.kernel_size == 7 ? response_kernel<Real, 7> : response_kernel<Real, 0>,
         {std::max<int64_t>(1, params.maps.blocks()), kThreads, bytes}, stream, params);
}

template int64_t response_workspace_bytes(const BranchMaps<float>&);
template int64_t response_workspace_bytes(const BranchMaps<double>&);
template void launch_response(const Response<float>&, cudaStream_t);
template void launch_response(const Response<double>&, cudaStream_t);

}  // namespace hashengine::triplet
