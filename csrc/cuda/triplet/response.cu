// The responses of triplet_attention, for all branches in one launch. A response is the convolution of the pooled maps
// of a branch, from 2 channels to 1. In training the launch also computes the batch statistics of the responses.
//
// Idea. A block loads a tile of the maximum and of the mean, with its border, into shared memory. If the reduce pass
// (reduce.cu) left a map in parts, the block merges them. For a backward, it also stores the tile without the border in
// `pooled`. A thread computes 8 results of one column. For a kernel_size of 7, 14 values of a column and 7 weights
// serve 56 multiplications. In training each block stores the mean of its results and their sum of squared deviations.
// The block that finishes last merges the statistics of all blocks (Chan, Golub, LeVeque 1979) in a fixed order, in
// float64.
//
// Traffic. Maps only: per value of a map, 2 Reals read and 1 to 3 written. For samples of 56 x 56 x 56 elements, the
// maps have about 5% as many values as x. Most of this traffic stays in L2. The kernel is limited by arithmetic: 98
// multiplications per value for a kernel_size of 7, at 1.3 instructions each.
//
// Launch. 128 threads per block. For a kernel_size of 7, a block has tiles of about 32 x 32 and up to 15 KB of shared
// memory (30 KB for float64). A larger kernel_size takes up to 96 KB and, if that is not enough, smaller tiles. The
// statistics need a memset of 4 bytes before the launch.
//
// Numerics. Sums in Real; the statistics of the blocks are merged in float64. The statistics of a block take two passes
// over its results, which are in registers.
//
// Limits. kernel_size is at most kTripletLargestCudaKernel. At this size in float64, the smallest tile (8 x 1 values,
// one thread) with its border takes almost all of the 96 KB in response_backward.cu.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/triplet/passes.h"

namespace hashengine::triplet {
namespace {

constexpr int kThreads = MapTiling::kThreads;
constexpr int kRows = MapTiling::kRows;

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

// Loads the maximum and the mean of the tile with its border into `planes`; values outside of the map are zeros. If the
// maps are saved for the backward, also stores the tile without the border in `pooled`, unless it is there already, and
// initializes the indices of maps with shares_index.
template <typename Real>
__device__ __forceinline__ void load_tile(const Response<Real>& params, const MapTile<Real>& tile, Real* planes) {
  const BranchMap<Real>& map = tile.map;
  const int border = params.maps.kernel_size / 2;
  const int pitch = map.tiling.pitch(params.maps.kernel_size), area = map.tiling.area(params.maps.kernel_size);
  for (int at = threadIdx.x; at < area; at += kThreads) {
    const int r = at / pitch - border, c = at % pitch - border;
    const int64_t row = tile.row + r, column = tile.column + c;
    Real largest = 0, mean = 0;
    if (row >= 0 && row < map.rows && column >= 0 && column < map.columns) {
      const Real* source = map.source_at(tile.sample, row, column);
      largest = source[0];
      mean = source[map.source.channel_stride];
      for (int part = 1; part < map.source.parts; ++part) {
        source += map.source.part_stride;
        largest = maximum(largest, source[0]);
        mean += source[map.source.channel_stride];
      }
      if (r >= 0 && r < map.tiling.rows() && c >= 0 && c < map.tiling.columns) {
        const int64_t offset = row * map.columns + column;
        if (params.pooled && !map.is_saved) {
          Real* saved = params.pooled + 2 * (map.flat_begin + tile.sample * map.numel()) + offset;
          saved[0] = largest;
          saved[map.numel()] = mean;
        }
        if (params.index && map.shares_index)
          params.index[map.flat_begin + tile.sample * map.numel() + offset] = kNoIndex;
      }
    }
    planes[at] = largest;
    planes[area + at] = mean;
  }
}

// Stores the statistics of the block's results. All threads of the block must call it.
template <typename Real>
__device__ __forceinline__ void store_statistics(const Real (&results)[kRows], const MapTile<Real>& tile,
                                                 BlockStatistics* statistics) {
  __shared__ Real block_mean;
  const MapTiling& tiling = tile.map.tiling;
  const int64_t rows = min(tile.map.rows - tile.row, static_cast<int64_t>(tiling.rows()));
  const int64_t columns = min(tile.map.columns - tile.column, static_cast<int64_t>(tiling.columns));
  const Real count = static_cast<Real>(rows * columns);
  Real sum = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (tile.has(r)) sum += results[r];
  sum = block_sum(sum);
  if (threadIdx.x == 0) block_mean = sum / count;
  __syncthreads();
  Real deviations = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (tile.has(r)) deviations += (results[r] - block_mean) * (results[r] - block_mean);
  deviations = block_sum(deviations);
  if (threadIdx.x == 0) *statistics = {block_mean, deviations, count};
}

// Computes the mean and the variance of each branch from the statistics of all blocks. Only the block that finishes
// last calls it.
template <typename Real>
__device__ __forceinline__ void merge_statistics(const Response<Real>& params, const BlockStatistics* blocks) {
  __shared__ double merged_mean;
  for (int branch = 0; branch < params.maps.branches; ++branch) {
    int64_t begin = 0, end = gridDim.x, values = 0;
#pragma unroll
    for (int b = 0; b < kTripletBranches; ++b) {
      if (b == branch) begin = params.maps.branch[b].tiling.first_block;
      if (b == branch) values = params.maps.branch[b].numel() * params.maps.samples;
      if (b == branch + 1 && b < params.maps.branches) end = params.maps.branch[b].tiling.first_block;
    }
    double sum = 0, deviations = 0;
    for (int64_t block = begin + threadIdx.x; block < end; block += kThreads)
      sum += __ldcg(&blocks[block].mean) * __ldcg(&blocks[block].count);
    __syncthreads();  // block_sum requires it between two calls
    sum = block_sum(sum);
    if (threadIdx.x == 0) merged_mean = sum / static_cast<double>(values);
    __syncthreads();
    for (int64_t block = begin + threadIdx.x; block < end; block += kThreads) {
      const double distance = __ldcg(&blocks[block].mean) - merged_mean;
      deviations += __ldcg(&blocks[block].deviations) + __ldcg(&blocks[block].count) * distance * distance;
    }
    deviations = block_sum(deviations);
    if (threadIdx.x != 0) continue;
    params.mean[branch] = static_cast<Real>(merged_mean);
    params.var[branch] = static_cast<Real>(deviations / static_cast<double>(values));
  }
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
__global__ void __launch_bounds__(kThreads, 4) response_kernel(Response<Real> params) {
  if (!params.training && blockIdx.x == 0 && threadIdx.x == 0) copy_running_statistics(params);
  if (params.maps.samples == 0) return;
  Real* planes = dynamic_shared<Real>();
  const MapTile<Real> tile(params.maps);
  const int size = kSize > 0 ? kSize : params.maps.kernel_size;
  const int pitch = tile.map.tiling.pitch(size), area = tile.map.tiling.area(size);
  Real* weights = planes + 2 * area;
  for (int i = threadIdx.x; i < 2 * size * size; i += kThreads) weights[i] = tile.map.conv_weight[i];
  load_tile(params, tile, planes);
  __syncthreads();

  Real results[kRows] = {};
  if (tile.has(0)) {
    const Real* window = planes + tile.thread_group * kRows * pitch + tile.thread_column;
    correlate<kSize>(results, window, pitch, weights, size);
    correlate<kSize>(results, window + area, pitch, weights + size * size, size);
    Real* response = params.response + tile.map.flat_begin + tile.sample * tile.map.numel();
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (tile.has(r)) response[tile.offset(r)] = results[r];
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
