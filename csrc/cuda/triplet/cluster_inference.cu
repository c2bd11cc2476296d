// Inference of triplet_attention in one launch, if a sample fits into the shared memory of a cluster of blocks.
//
// Idea. A0, A1 and A2 are the axes of x in memory order; the A0 map is the map of the branch that pools A0, and a slice
// is the part of a sample at one index of A0 (tiles.cuh). Each block loads some consecutive slices and keeps them in
// shared memory. The blocks of the cluster divide the outer rows of the maps among them (cluster_plan.h). A row of the
// A1 or A2 map is pooled, convolved and used in the block that has its slice. For these maps, a block reads only the
// border of its rows from other blocks. For the A0 map, each block computes maxima and sums over its own slices. Then a
// block merges the maxima and sums of all blocks for its rows, in the order of the blocks, and writes the resulting
// gates to every block. The cluster synchronizes twice: before blocks read each other's maps, and after all gates are
// written.
//
// Traffic, for N elements of s bytes. Reads x, writes y: 2Ns, the floor. In shared memory, x is written once and read
// four times, three of them for pooling; in addition, about one float of the A1 map is read per element. Estimate for
// bfloat16 on an H200, at 128 bytes per clock and multiprocessor: this takes about half as long as the device memory
// traffic. Samples that do not fit take three launches, which move 3Ns.
//
// Launch. 128 to 512 threads per block and 1 to 8 blocks per cluster. A block has up to 113 KB of shared memory if two
// blocks fit into a multiprocessor, otherwise up to 227 KB. x is loaded by asynchronous copies of 16 bytes.
//
// Numerics. As in the three launches, except for the order of the additions. This order depends on the shape, on the
// dtype, on the alignment of the arrays, and on the device's shared memory and number of multiprocessors, but not on
// timing. A NaN makes the maxima and sums of its lines NaN.
//
// Limits. Compute capability 9.0 and later; no float64. A sample and its maps must fit into the shared memory of 8
// blocks.

#include "cuda/common/cluster.cuh"
#include "cuda/common/staging.cuh"
#include "cuda/triplet/accumulator.cuh"
#include "cuda/triplet/cluster_plan.h"
#include "cuda/triplet/passes.h"

namespace hashengine::triplet {
namespace {

// The part of the sample that the block holds.
template <typename T>
struct ClusterBlock {
  const ClusterPlan& plan;
  int rank;
  int first[3];  // the block's first row of each map
  int count[3];  // the block's number of rows of each map
  T* x;

  explicit __device__ __forceinline__ ClusterBlock(const ClusterPlan& cluster_plan)
      : plan(cluster_plan), rank(static_cast<int>(blockIdx.x) % plan.blocks), x(dynamic_shared<T>()) {
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      first[a] = rank * plan.block_rows[a];
      count[a] = max(0, min(plan.block_rows[a], plan.outer(a) - first[a]));
    }
  }
  __device__ __forceinline__ int slices() const { return count[1]; }
  __device__ __forceinline__ int slice_numel() const { return plan.size[1] * plan.size[2]; }
  __device__ __forceinline__ int numel() const { return slices() * slice_numel(); }
  // Offset in x of the block's first element.
  __device__ __forceinline__ int64_t begin() const {
    const int64_t sample = blockIdx.x / static_cast<unsigned>(plan.blocks);
    return (sample * plan.size[0] + first[1]) * slice_numel();
  }
  __device__ __forceinline__ float* at(int floats) const { return dynamic_shared<float>() + floats; }
  __device__ __forceinline__ float* weights(int a) const {
    return at(plan.weights) + a * 2 * plan.kernel_size * plan.kernel_size;
  }
  // Offset in a plane of a value of the first channel. `row` counts from the block's first row; `column` is a column of
  // the map.
  __device__ __forceinline__ int plane_offset(int a, int row, int column) const {
    return (row + plan.border()) * plan.pitch(a) + column + plan.border();
  }
};

// The parameters of the branch that pools an axis.
struct AxisParameters {
  const float* conv_weight;  // null: no branch pools this axis
  const float* bn_weight;
  const float* bn_bias;
  const float* mean;
  const float* var;
  bool transposed;
};

template <typename T>
struct Params {
  const T* x;
  T* y;
  ClusterPlan plan;
  AxisParameters axis[3];
  double eps;
  float branch_weight;  // 1 / number of branches

  __device__ __forceinline__ bool has(int a) const { return axis[a].conv_weight != nullptr; }
};

// Loads the weights of the convolutions, transposed to the memory order of the maps, and sets the gates of an axis
// without a branch to zero.
template <typename T>
__device__ __forceinline__ void prepare(const Params<T>& params, const ClusterBlock<T>& block) {
  const int size = params.plan.kernel_size, area = size * size;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    const AxisParameters& axis = params.axis[a];
    for (int i = threadIdx.x; params.has(a) && i < 2 * area; i += blockDim.x) {
      const int row = i % area / size, column = i % size;
      block.weights(a)[i] = axis.conv_weight[i - i % area + (axis.transposed ? column * size + row : i % area)];
    }
    const int gates = params.plan.inner(a) * (a == 0 ? params.plan.outer(a) : params.plan.block_rows[a]);
    for (int i = threadIdx.x; !params.has(a) && i < gates; i += blockDim.x) block.at(params.plan.gate[a])[i] = 0;
  }
}

// Calls emit(line, largest, sum) with the maximum and the sum of x along kAxis, over the block's slices. Along A0 and
// A1 `line` is the index of a vector of kWidth adjacent lines, along A2 the index of a single line. Several lanes share
// a line (or a vector of lines) if there are too few lines to keep the block busy. Along A2, up to 8 lanes share a line
// in any case. These lanes are adjacent along A2, otherwise warp_lines apart, so that a warp reads contiguous memory.
template <int kWidth, int kAxis, typename T, typename Emit>
__device__ __forceinline__ void pool_axis(const ClusterBlock<T>& block, Emit emit) {
  constexpr int kLineWidth = kAxis == 2 ? 1 : kWidth, kMinLanes = kAxis == 2 ? 8 : 1;
  const int row_vectors = block.plan.size[2] / kWidth, slice_vectors = block.plan.size[1] * row_vectors;
  const int lines = kAxis == 0 ? slice_vectors : block.slices() * (kAxis == 1 ? row_vectors : block.plan.size[1]);
  const int length = kAxis == 0 ? block.slices() : kAxis == 1 ? block.plan.size[1] : row_vectors;
  const int step = kAxis == 0 ? slice_vectors : kAxis == 1 ? row_vectors : 1;
  int lanes = 1;
  while (lanes < kWarpThreads && 2 * lanes <= length &&
         (lanes < kMinLanes || lines * lanes < static_cast<int>(blockDim.x)))
    lanes *= 2;
  const int warp_lines = kWarpThreads / lanes, distance = kAxis == 2 ? 1 : warp_lines;
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads, warps = blockDim.x / kWarpThreads;
  const int part = lane / distance % lanes;

  for (int first = warp * warp_lines; first < lines; first += warps * warp_lines) {
    const int line = first + (kAxis == 2 ? lane / lanes : lane % warp_lines);
    const int begin =
        kAxis == 1 ? line / row_vectors * slice_vectors + line % row_vectors : line * (kAxis == 2 ? row_vectors : 1);
    Accumulator<T, kWidth, true> running;
    const int end = line < lines ? length : 0;
#pragma unroll 4
    for (int i = part; i < end; i += lanes) running.add(vector_at<kWidth>(block.x, (begin + i * step) * kWidth));
    Vector<float, kLineWidth> largest, sum;
#pragma unroll
    for (int i = 0; i < kLineWidth; ++i) {
      largest.at[i] = widen(running.largest.at(i));
      sum.at[i] = running.sum[i];
    }
#pragma unroll
    for (int i = kLineWidth; i < kWidth; ++i) {
      largest.at[0] = maximum(largest.at[0], widen(running.largest.at(i)));
      sum.at[0] += running.sum[i];
    }
    for (int apart = distance; apart < lanes * distance; apart *= 2) {
#pragma unroll
      for (int i = 0; i < kLineWidth; ++i) {
        largest.at[i] = maximum(largest.at[i], __shfl_xor_sync(kWholeWarp, largest.at[i], apart));
        sum.at[i] += __shfl_xor_sync(kWholeWarp, sum.at[i], apart);
      }
    }
    if (line < lines && part == 0) emit(line, largest, sum);
  }
}

// Pools the block's slices: the block's rows of the planes of A1 and A2, and its partial A0 map.
template <int kWidth, typename T>
__device__ __forceinline__ void pool_slices(const Params<T>& params, const ClusterBlock<T>& block) {
  const ClusterPlan& plan = params.plan;
  if (params.has(0))
    pool_axis<kWidth, 0>(block, [&](int line, const auto& largest, const auto& sum) {
      vector_at<kWidth>(block.at(plan.partial), line * kWidth) = largest;
      vector_at<kWidth>(block.at(plan.partial) + block.slice_numel(), line * kWidth) = sum;
    });
  const auto store = [&](int a, int row, int column, float largest, float sum) {
    float* value = block.at(plan.plane[a]) + block.plane_offset(a, row, column);
    value[0] = largest;
    value[plan.area(a)] = sum / static_cast<float>(plan.size[a]);
  };
  const int row_vectors = plan.size[2] / kWidth;
  if (params.has(1))
    pool_axis<kWidth, 1>(block, [&](int line, const auto& largest, const auto& sum) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        store(1, line / row_vectors, line % row_vectors * kWidth + i, largest.at[i], sum.at[i]);
    });
  if (params.has(2))
    pool_axis<kWidth, 2>(block, [&](int line, const auto& largest, const auto& sum) {
      store(2, line / plan.size[1], line % plan.size[1], largest.at[0], sum.at[0]);
    });
}

// Completes the block's rows of a plane with their border: with values from other blocks, and with zeros outside of the
// map. For A0 it also computes the rows themselves, from the partial A0 maps of all blocks.
template <int kAxis, typename T>
__device__ __forceinline__ void complete_plane(const Params<T>& params, const ClusterBlock<T>& block) {
  const ClusterPlan& plan = params.plan;
  if (!params.has(kAxis) || block.count[kAxis] == 0) return;
  const int pitch = plan.pitch(kAxis), border = plan.border(), inner = plan.inner(kAxis),
            block_rows = plan.block_rows[kAxis];
  float* plane = block.at(plan.plane[kAxis]);
  for (int at = threadIdx.x; at < (block.count[kAxis] + plan.kernel_size - 1) * pitch; at += blockDim.x) {
    const int row = at / pitch - border, column = at % pitch - border, outer = block.first[kAxis] + row;
    const bool is_inside = outer >= 0 && outer < plan.outer(kAxis) && column >= 0 && column < inner;
    if (kAxis > 0 && is_inside && row >= 0 && row < block.count[kAxis]) continue;  // pooled by this block
    float largest = 0, mean = 0;
    if (is_inside && kAxis > 0) {
      const float* source =
          map_to_rank(plane, outer / block_rows) + block.plane_offset(kAxis, outer % block_rows, column);
      largest = source[0];
      mean = source[plan.area(kAxis)];
    } else if (is_inside) {
      largest = -INFINITY;
#pragma unroll 4
      for (int rank = 0; rank < plan.blocks; ++rank) {
        const float* source = map_to_rank(block.at(plan.partial), rank) + outer * inner + column;
        largest = maximum(largest, source[0]);
        mean += source[block.slice_numel()];
      }
      mean /= static_cast<float>(plan.size[0]);
    }
    plane[at] = largest;
    plane[plan.area(kAxis) + at] = mean;
  }
}

// Computes the gates of the block's rows of one map. A task is kRows rows of one column. The tasks of all maps are
// numbered consecutively, so that few threads are idle at the end of a map. Returns the thread's next task, counted
// from the first task of the next map.
template <int kAxis, int kSize, typename T>
__device__ __forceinline__ int compute_gates(const Params<T>& params, const ClusterBlock<T>& block, int task) {
  constexpr int kRows = MapTiling::kRows;
  const ClusterPlan& plan = params.plan;
  const AxisParameters& axis = params.axis[kAxis];
  if (!params.has(kAxis)) return task;
  const int inner = plan.inner(kAxis), pitch = plan.pitch(kAxis), size = plan.kernel_size;
  const int tasks = ceil_div(block.count[kAxis], kRows) * inner;
  const float* weights = block.weights(kAxis);
  for (; task < tasks; task += blockDim.x) {
    const auto function = GateFunction<float>::load(axis.mean, axis.var, axis.bn_weight, axis.bn_bias, params.eps);
    const int first = task / inner * kRows, column = task % inner;
    const float* window = block.at(plan.plane[kAxis]) + first * pitch + column;
    float responses[1][kRows] = {};
    correlate<kSize>(responses, window, pitch, weights, size);
    correlate<kSize>(responses, window + plan.area(kAxis), pitch, weights + size * size, size);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= block.count[kAxis]) break;
      const float gate = params.branch_weight * function.gate(responses[0][r]);
      float* gates = block.at(plan.gate[kAxis]);
      if constexpr (kAxis > 0) {
        gates[(first + r) * inner + column] = gate;
      } else {
        for (int rank = 0; rank < plan.blocks; ++rank)
          map_to_rank(gates, rank)[(block.first[0] + first + r) * inner + column] = gate;
      }
    }
  }
  return task - tasks;
}

// Computes y for the block's slices. A thread processes the same position of all of its slices, as in apply.cuh.
template <int kWidth, typename T>
__device__ __forceinline__ void apply_gates(const Params<T>& params, const ClusterBlock<T>& block) {
  constexpr bool kIsDirect = kWidth * sizeof(T) == kVectorBytes;  // otherwise y is staged in shared memory
  const int rows = params.plan.size[1], columns = params.plan.size[2], row_vectors = columns / kWidth;
  const int positions = rows * row_vectors, threads = blockDim.x, thread = threadIdx.x;
  const int slots = max(1, threads / positions), slot = slots > 1 ? thread / positions : 0;
  const float* gates[3];
#pragma unroll
  for (int a = 0; a < 3; ++a) gates[a] = block.at(params.plan.gate[a]);
  T* out = kIsDirect ? params.y + block.begin() : block.x;

  for (int position = thread - slot * positions; slot < slots && position < positions; position += threads) {
    const int row = position / row_vectors, column = position % row_vectors * kWidth;
    const Vector<float, kWidth> own_gates = vector_at<kWidth>(gates[0], position * kWidth);
#pragma unroll 2
    for (int slice = slot; slice < block.slices(); slice += slots) {
      const int offset = (slice * positions + position) * kWidth;
      Vector<T, kWidth> values = vector_at<kWidth>(block.x, offset);
      const Vector<float, kWidth> column_gates = vector_at<kWidth>(gates[1], slice * columns + column);
      const float row_gate = gates[2][slice * rows + row];
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        values.at[i] = narrow<T>(widen_at(values, i) * (own_gates.at[i] + column_gates.at[i] + row_gate));
      vector_at<kWidth>(out, offset) = values;
    }
  }
  if constexpr (!kIsDirect) {
    __syncthreads();
    unstage(block.x, block.numel(), params.y + block.begin());
  }
}

LaunchShape launch_shape(const ClusterPlan& plan, int64_t samples) {
  return {samples * plan.blocks, plan.threads, plan.bytes, plan.blocks};
}

template <typename T, int kWidth, int kSize>
__global__ void __launch_bounds__(kMaxClusterThreads, 2) inference_kernel(Params<T> params) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const ClusterBlock<T> block(params.plan);
  stage(params.x + block.begin(), block.numel(), block.x);
  prepare(params, block);  // while x is copied
  wait_for_staged();
  pool_slices<kWidth>(params, block);
  cluster_sync();  // all blocks have pooled their slices
  complete_plane<0>(params, block);
  complete_plane<1>(params, block);
  complete_plane<2>(params, block);
  __syncthreads();
  int task = static_cast<int>(threadIdx.x);
  task = compute_gates<0, kSize>(params, block, task);
  task = compute_gates<1, kSize>(params, block, task);
  compute_gates<2, kSize>(params, block, task);
  cluster_sync();  // all gates are written, and no block reads another block's memory after this
  apply_gates<kWidth>(params, block);
#endif
}

}  // namespace

bool has_cluster_inference(const TripletShape& shape) {
  const ClusterPlan plan = ClusterPlan::make(shape);
  if (!plan.exists()) return false;
  bool can_run = false;
  with_element<float>(shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    // The bounds of the launch limit the registers, so that all instances of the template fit alike. The body of the
    // kernel is empty in code that does not know clusters, even if the cluster is a single block.
    const auto kernel = inference_kernel<T, 1, 0>;
    can_run =
        kernel_code(kernel).architecture >= kClusterArchitecture && can_launch_cluster(kernel, launch_shape(plan, 1));
  });
  return can_run;
}

void launch_cluster_inference(const TripletInference& params, int width, cudaStream_t stream) {
  const Geometry geometry = Geometry::from_shape(params.shape);
  const ClusterPlan plan = ClusterPlan::make(params.shape);
  with_element<float>(params.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    Params<T> kernel_params{static_cast<const T*>(params.x),
                            static_cast<T*>(params.y),
                            plan,
                            {},
                            params.parameters.eps,
                            1.0f / static_cast<float>(geometry.branches)};
    for (int a = 0; a < 3; ++a) {
      const int branch = geometry.axis[a].branch;
      if (branch < 0) continue;
      const auto floats = [&](const void* const* list) { return static_cast<const float*>(list[branch]); };
      kernel_params.axis[a] = {
          floats(params.parameters.conv_weight), floats(params.parameters.bn_weight), floats(params.parameters.bn_bias),
          floats(params.running_mean),           floats(params.running_var),          geometry.axis[a].transposed};
    }
    with_vector_width<T>(width, [&](auto vector) {
      constexpr int kWidth = decltype(vector)::value;
      launch(params.shape.kernel_size == 7 ? inference_kernel<T, kWidth, 7> : inference_kernel<T, kWidth, 0>,
             launch_shape(plan, geometry.samples), stream, kernel_params);
    });
  });
}

}  // namespace hashengine::triplet
