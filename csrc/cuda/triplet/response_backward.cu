// The part of triplet_attention's backward that processes only maps (maps.cuh), for all branches in three launches. It
// turns the sums of x * dy along each axis into the gradients of BatchNorm, of the convolution's weights and of the
// pooled maps.
//
// Idea. (1) affine_kernel merges the parts of the sums and multiplies the sums by the slope of the gate. It also sums
// the terms of the gradients of BatchNorm's parameters; the block that finishes last adds up the sums of all blocks.
// (2) convolution_kernel loads a tile of the response's gradient and of the pooled maps, with a border, into shared
// memory. First, a thread correlates the gradient with the flipped weights of both channels for 8 values of a column.
// Then it computes a part of the weights' gradients. For this part, if kernel_size is 7, the threads form 18 groups of
// 14, with one thread per column of weights. A thread computes 7 weights' gradients, so that 6 loads of vectors serve
// 56 multiplications. (3) weights_kernel sums the weights' gradients over the tiles, with one block per weight.
//
// Traffic. Maps only: per value of a map, about 7 Reals read and 3 written; per tile, 2 * kernel_size^2 Reals written
// and read.
//
// Instructions. In training with samples of 256 x 56 x 56 in NCHW, affine_kernel takes about 85 per value of the CW
// map, 88 of the HC map and 139 of the HW map, whose sums are in 5 parts. convolution_kernel takes 396 per value of the
// CW map, 416 of the HC map and 421 of the HW map. For a kernel_size of 7, 98 of them are the multiplications of the
// correlation, and 98 those of the weights' gradients.
//
// Launch. 256 threads per block (96 in weights_kernel) and tiles as in response.cu, with at most half as many values.
// For a kernel_size of 7, a block has up to 69 KB of shared memory (94 KB for float64). A memset of 4 bytes precedes
// the first launch.
//
// Numerics. Sums in Real within a tile, in float64 over the tiles. If kernel_size is not 7, one thread sums a weight's
// gradient over a tile, in float64, too. The launch plan fixes the order; there are no atomics on floats.

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/triplet/passes.h"

namespace hashengine::triplet {
namespace {

constexpr int kThreads = MapTiling::kThreads;
constexpr int kRows = MapTiling::kRows;
constexpr int kPlanes = MapTiling::kBackwardPlanes;
constexpr int kWeightThreads = 96;  // threads per block of weights_kernel

struct BlockSums {
  double affine;             // the sum of grad_affine
  double affine_normalized;  // the sum of grad_affine * normalized response
};

// The arrays in ResponseBackward::workspace.
template <typename Real>
struct BackwardWorkspace {
  unsigned* finished_blocks;
  BlockSums* sums;
  Real* weight_gradients;  // [2 * kernel_size^2][blocks]: each block's sums over its tile

  HE_HOST_DEVICE BackwardWorkspace(void* workspace, int64_t blocks)
      : finished_blocks(static_cast<unsigned*>(workspace)),
        sums(reinterpret_cast<BlockSums*>(static_cast<char*>(workspace) + kGridSumHeaderBytes)),
        weight_gradients(reinterpret_cast<Real*>(sums + blocks)) {}
};

// Calls function(branch). In each of the unrolled calls, the argument is a constant, for the reason given at
// BranchPointers.
template <typename Function>
__device__ __forceinline__ void with_branch(int branch, Function function) {
#pragma unroll
  for (int b = 0; b < kTripletBranches; ++b)
    if (b == branch) function(b);
}

template <typename Real>
__device__ __forceinline__ GateFunction<Real> gate_function(const ResponseBackward<Real>& params,
                                                            const MapTile<Real>& tile) {
  return GateFunction<Real>::load(params.mean + tile.branch, params.var + tile.branch, tile.map.bn_weight,
                                  tile.map.bn_bias, params.maps.eps);
}

// Sums the gradients of BatchNorm's parameters over the blocks, with one warp per branch. Only the block that finishes
// last calls it.
template <typename Real>
__device__ __forceinline__ void merge_sums(const ResponseBackward<Real>& params, const BlockSums* blocks) {
  const int branch = static_cast<int>(threadIdx.x) / kWarpThreads, lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  if (branch >= params.maps.branches) return;
  int64_t begin = 0, end = 0;
  with_branch(branch, [&](int b) {
    begin = params.maps.branch[b].tiling.first_block;
    end = begin + params.maps.branch[b].tiling.blocks(params.maps.samples);
  });
  double affine = 0, affine_normalized = 0;
#pragma unroll 4
  for (int64_t block = begin + lane; block < end; block += kWarpThreads) {
    affine += __ldcg(&blocks[block].affine);
    affine_normalized += __ldcg(&blocks[block].affine_normalized);
  }
  affine = warp_sum(affine);
  affine_normalized = warp_sum(affine_normalized);
  if (lane != 0) return;
  params.grad_bn_bias[branch] = static_cast<Real>(affine);
  params.grad_bn_weight[branch] = static_cast<Real>(affine_normalized);
}

template <typename Real>
__global__ void __launch_bounds__(kThreads) affine_kernel(ResponseBackward<Real> params) {
  const MapTile<Real> tile(params.maps);
  const BranchMap<Real>& map = tile.map;
  const GateFunction<Real> function = gate_function(params, tile);
  const int rows = tile.rows_inside();
  const Real* part_source = map.source_at(tile.sample, tile.value_row(0), tile.column + tile.thread_column);
  Real grad_gates[kRows] = {};
#pragma unroll 1
  for (int part = 0; part < map.source.parts; ++part) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) grad_gates[r] += part_source[r * map.row_stride];
    part_source += map.source.part_stride;
  }
  const int64_t first = map.flat_begin + tile.sample * map.numel() + tile.offset(0);
  const Real* response_source = params.response + first;
  Real responses[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    responses[r] = r < rows ? *response_source : Real(0);
    response_source += map.columns;
  }
  Real* grad_affine = params.grad_affine + first;
  Real affine = 0, affine_normalized = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    const Real gate = function.gate(responses[r]);
    const Real gradient = grad_gates[r] * gate * (Real(1) - gate);
    *grad_affine = gradient;
    affine += gradient;
    affine_normalized += gradient * function.normalized(responses[r]);
    grad_affine += map.columns;
  }
  affine = block_sum(affine);
  __syncthreads();
  affine_normalized = block_sum(affine_normalized);
  const BackwardWorkspace<Real> workspace(params.workspace, gridDim.x);
  if (threadIdx.x == 0) workspace.sums[blockIdx.x] = {affine, affine_normalized};
  if (finishes_last(workspace.finished_blocks)) merge_sums(params, workspace.sums);
}

// The planes in shared memory: the response's gradient, the maximum and the mean of a tile with its border. For a
// kernel_size of 7, columns are contiguous, so that a thread loads the rows of a strip (kRows rows of one column) and
// their border as vectors. Otherwise rows are contiguous.
struct PlaneLayout {
  int row_pitch, column_pitch;
  int area;
  // The gradient's columns begin with this number of unused values. Then the gradients of a strip are aligned.
  int gradient_begin;

  template <int kSize>
  static __device__ __forceinline__ PlaneLayout make(const MapTiling& tiling, int size) {
    if constexpr (kSize == 7) return {1, tiling.column_pitch(), tiling.column_area(), 1};
    return {tiling.pitch(size), 1, tiling.area(size), 0};
  }
};

// A thread loads this number of values for the rows of a strip with their border of 3 rows on each side. Two are
// unused: of the gradient the first and the last one, of the maximum and the mean the last two.
constexpr int kStripValues = kRows + 8;

// Loads the response's gradient, the maximum and the mean of the tile with its border, where they are inside the map.
template <typename Real>
__device__ __forceinline__ void load_tile(const ResponseBackward<Real>& params, const MapTile<Real>& tile,
                                          const PlaneLayout& layout, Real* planes) {
  const BranchMap<Real>& map = tile.map;
  const GateFunction<Real> function = gate_function(params, tile);
  const Real slope = function.weight * function.rstd;
  // In training the mean and the variance depend on every response.
  const Real per_value = params.training ? Real(1) / static_cast<Real>(map.numel() * params.maps.samples) : Real(0);
  const Real from_mean = params.grad_bn_bias[tile.branch] * per_value;
  const Real from_var = params.grad_bn_weight[tile.branch] * per_value;
  const int64_t sample_begin = map.flat_begin + tile.sample * map.numel();
  const Real* responses = params.response + sample_begin;
  const Real* grad_affine = params.grad_affine + sample_begin;
  const Real* pooled = params.pooled + 2 * sample_begin;
  BorderLines<false> lines(tile, params.maps.kernel_size);
  lines.line_pitch = layout.row_pitch;
  lines.place_pitch = layout.column_pitch;
  const Real* const arrays[] = {responses, grad_affine, pooled, pooled + map.numel()};
  lines.visit(arrays, map.columns, [&](int at, int64_t, const Vector<Real, 4>& values) {
    const Real through_statistics = from_mean + function.normalized(values.at[0]) * from_var;
    planes[layout.gradient_begin + at] = (values.at[1] - through_statistics) * slope;
    planes[layout.area + at] = values.at[2];
    planes[2 * layout.area + at] = values.at[3];
  });
}

// The place of a weight in shared memory. For a kernel_size of 7, the weights of a column are contiguous, for both
// channels.
template <int kSize>
__device__ __forceinline__ int weight_place(int channel, int y, int x, int size) {
  return kSize > 0 ? (x * 2 + channel) * kSize + y : (channel * size + y) * size + x;
}

// sums[channel][r] += the correlation of the channel's weights [size, size] with the window of the gradient that begins
// r rows below `window`. kSize is the size if it is 7, otherwise 0. If it is 7, the thread loads each value of its
// windows once, for all of its sums, and `window` is the unused value above the windows.
template <int kSize, typename Real>
__device__ __forceinline__ void correlate_both(Real (&sums)[2][kRows], const Real* window, const PlaneLayout& layout,
                                               const Real* weights, int size) {
#pragma unroll 1
  for (int x = 0; x < size; ++x) {
    if constexpr (kSize > 0) {
      const auto strip = vector_at<kStripValues>(window, x * layout.column_pitch);
      const Real* column = weights + weight_place<kSize>(0, 0, x, size);
#pragma unroll
      for (int pair = 0; pair < kSize; ++pair) {
        const auto both = vector_at<2>(column, 2 * pair);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int channel = (2 * pair + i) / kSize, y = (2 * pair + i) % kSize;
#pragma unroll
          for (int r = 0; r < kRows; ++r) sums[channel][r] += both.at[i] * strip.at[1 + r + y];
        }
      }
    } else {
#pragma unroll 1
      for (int y = 0; y < size; ++y) {
        const Real first = weights[weight_place<kSize>(0, y, x, size)];
        const Real second = weights[weight_place<kSize>(1, y, x, size)];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const Real value = window[(r + y) * layout.row_pitch + x];
          sums[0][r] += first * value;
          sums[1][r] += second * value;
        }
      }
    }
  }
}

// Computes the tile's part of the gradients of 7 x 7 weights. A group of kColumns threads processes every kGroups-th
// strip of the tile, with one thread per column of weights.
template <typename Real>
__device__ __forceinline__ void tile_weight_gradients_7(const MapTiling& tiling, const PlaneLayout& layout,
                                                        const Real* planes, Real* scratch, Real* result,
                                                        int64_t stride) {
  constexpr int kSize = 7, kColumns = 2 * kSize, kGroups = kThreads / kColumns;
  const int weight_column = static_cast<int>(threadIdx.x) % kColumns, group = static_cast<int>(threadIdx.x) / kColumns;
  const int channel = weight_column / kSize, x = weight_column % kSize;
  Real sums[kSize] = {};
  if (group < kGroups) {
    const Real* gradient = planes + layout.gradient_begin + kSize / 2 + (group + kSize / 2) * layout.column_pitch;
    const Real* window = planes + (1 + channel) * layout.area + (group + x) * layout.column_pitch;
    const int step = kGroups * layout.column_pitch, wrap = kRows - tiling.columns * layout.column_pitch;
    int column = group, strips_left = tiling.groups;  // in the column
    while (true) {
      for (; column >= tiling.columns; column -= tiling.columns) {
        --strips_left;
        gradient += wrap;
        window += wrap;
      }
      if (strips_left <= 0) break;
      const auto gradients = vector_at<kRows>(gradient, 0);
      const auto pooled = vector_at<kStripValues>(window, 0);
#pragma unroll
      for (int y = 0; y < kSize; ++y) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[y] += gradients.at[r] * pooled.at[r + y];
      }
      column += kGroups;
      gradient += step;
      window += step;
    }
#pragma unroll
    for (int y = 0; y < kSize; ++y) scratch[group * kColumns * kSize + (channel * kSize + y) * kSize + x] = sums[y];
  }
  __syncthreads();
  for (int weight = threadIdx.x; weight < kColumns * kSize; weight += kThreads) {
    Real sum = 0;
    for (int g = 0; g < kGroups; ++g) sum += scratch[g * kColumns * kSize + weight];
    result[weight * stride] = sum;
  }
}
// The number of values in the scratch of tile_weight_gradients_7: 98 weights for each group of 14 threads.
constexpr int kWeightScratchValues = kThreads / 14 * 98;

// Computes the tile's part of the gradients of weights of any size. A thread sums over the whole tile for one weight
// after another.
template <typename Real>
__device__ __forceinline__ void tile_weight_gradients(const MapTiling& tiling, int size, const Real* planes,
                                                      Real* gradients, int64_t stride) {
  const int pitch = tiling.pitch(size), area = tiling.area(size);
  for (int weight = threadIdx.x; weight < 2 * size * size; weight += kThreads) {
    const int channel = weight / (size * size), y = weight / size % size, x = weight % size;
    const Real* gradient = planes + size / 2 * pitch + size / 2;
    const Real* window = planes + (1 + channel) * area + y * pitch + x;
    double sum = 0;
    for (int row = 0; row < tiling.rows(); ++row)
      for (int column = 0; column < tiling.columns; ++column)
        sum += static_cast<double>(gradient[row * pitch + column]) * window[row * pitch + column];
    gradients[weight * stride] = static_cast<Real>(sum);
  }
}

template <typename Real, int kSize>
__global__ void __launch_bounds__(kThreads) convolution_kernel(ResponseBackward<Real> params) {
  Real* planes = dynamic_shared<Real>();
  const MapTile<Real> tile(params.maps);
  const BranchMap<Real>& map = tile.map;
  const int size = kSize > 0 ? kSize : params.maps.kernel_size;
  const PlaneLayout layout = PlaneLayout::make<kSize>(map.tiling, size);
  Real* weights = planes + kPlanes * layout.area;
  for (int i = threadIdx.x; i < 2 * size * size; i += kThreads) {
    const int channel = i / (size * size), place = i % (size * size);
    weights[weight_place<kSize>(channel, place / size, place % size, size)] =
        map.conv_weight[channel * size * size + size * size - 1 - place];
  }
  fill_with_zeros(planes, kPlanes * layout.area);
  __syncthreads();
  load_tile(params, tile, layout, planes);
  __syncthreads();

  if (tile.has(0)) {
    const Real* window =
        planes + tile.thread_group * kRows * layout.row_pitch + tile.thread_column * layout.column_pitch;
    Real results[2][kRows] = {};
    correlate_both<kSize>(results, window, layout, weights, size);
    const Real per_element = Real(1) / static_cast<Real>(map.pooled_length);
    Real* grad_largest = params.grad_pooled + 2 * (map.flat_begin + tile.sample * map.numel()) + tile.offset(0);
    Real* grad_mean = grad_largest + map.numel();
    const int rows = tile.rows_inside();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      *grad_largest = results[0][r];
      *grad_mean = results[1][r] * per_element;
      grad_largest += map.columns;
      grad_mean += map.columns;
    }
  }
  Real* gradients = BackwardWorkspace<Real>(params.workspace, gridDim.x).weight_gradients + blockIdx.x;
  if constexpr (kSize == 7) {
    tile_weight_gradients_7(map.tiling, layout, planes, weights + 2 * size * size, gradients, gridDim.x);
  } else {
    tile_weight_gradients(map.tiling, size, planes, gradients, gridDim.x);
  }
}

template <typename Real>
__global__ void __launch_bounds__(kWeightThreads) weights_kernel(ResponseBackward<Real> params, int64_t blocks) {
  const int weights = 2 * params.maps.kernel_size * params.maps.kernel_size;
  const int branch = static_cast<int>(blockIdx.x) / weights, weight = static_cast<int>(blockIdx.x) % weights;
  int64_t begin = 0, end = 0;
  with_branch(branch, [&](int b) {
    begin = params.maps.branch[b].tiling.first_block;
    end = begin + params.maps.branch[b].tiling.blocks(params.maps.samples);
  });
  const Real* gradients = BackwardWorkspace<Real>(params.workspace, blocks).weight_gradients + weight * blocks;
  double sum = 0;
  for (int64_t block = begin + threadIdx.x; block < end; block += kWeightThreads) sum += gradients[block];
  sum = block_sum(sum);
  if (threadIdx.x == 0) params.grad_conv_weight[blockIdx.x] = static_cast<Real>(sum);
}

}  // namespace

template <typename Real>
int64_t response_backward_workspace_bytes(const BranchMaps<Real>& maps) {
  const int64_t weights = 2 * maps.kernel_size * maps.kernel_size;
  return kGridSumHeaderBytes + maps.blocks() * static_cast<int64_t>(sizeof(BlockSums) + weights * sizeof(Real));
}

template <typename Real>
void launch_response_backward(const ResponseBackward<Real>& params, cudaStream_t stream) {
  const int64_t blocks = params.maps.blocks();
  cudaMemsetAsync(params.workspace, 0, sizeof(unsigned), stream);
  launch(affine_kernel<Real>, blocks, kThreads, stream, params);
  const bool is_7 = params.maps.kernel_size == 7;
  const int64_t values = params.maps.shared_values(kPlanes) + (is_7 ? kWeightScratchValues : 0);
  launch(is_7 ? convolution_kernel<Real, 7> : convolution_kernel<Real, 0>,
         {blocks, kThreads, values * static_cast<int64_t>(sizeof(Real))}, stream, params);
  launch(weights_kernel<Real>, params.maps.branches * 2 * params.maps.kernel_size * params.maps.kernel_size,
         kWeightThreads, stream, params, blocks);
}

template int64_t response_backward_workspace_bytes(const BranchMaps<float>&);
template int64_t response_backward_workspace_bytes(const BranchMaps<double>&);
template void launch_response_backward(const ResponseBackward<float>&, cudaStream_t);
template void launch_response_backward(const ResponseBackward<double>&, cudaStream_t);

}  // namespace hashengine::triplet
