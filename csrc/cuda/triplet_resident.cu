// Triplet attention's inference in one launch, where a sample fits into the shared memory of a cluster of blocks.
//
// Idea. Each block loads a range of A0 (triplet_tiles.cuh) and keeps it. A map's outer rows are split over the cluster
// (triplet_resident.cuh), so that the A1 and A2 maps are pooled, convolved and used where their slices are: a block
// fetches only the border of its rows from its neighbours. Of the A0 map each block has maxima and sums over its own
// slices; a block merges its rows' of all blocks, in their order, and tells every block the gates. Two barriers of the
// cluster: before the maps are fetched and after the gates are told.
//
// Traffic, N elements of s bytes. Reads x, writes y: 2Ns, the floor. Shared memory sees x four times, three of them for
// the pools, and a float of a map for every element and gate: at 128 bytes a clock about a third of the time of the
// device's memory for bfloat16. The three launches that take what does not fit move 3Ns.
//
// Launch. 128 to 512 threads a block, clusters of 1 to 8 blocks, of up to 113 KB each where two of them fit into a
// multiprocessor, else of up to 227 KB. x comes by asynchronous copies of 16 bytes.
//
// Numerics. As the three launches; sums are in another order, that of lanes and of blocks, which the shape and the
// device's shared memory fix. A NaN makes its maxima and sums NaN.
//
// Limits. From compute capability 9.0 on; no float64. A sample with its maps within 8 blocks' shared memory.

#include "staging.cuh"
#include "triplet_reduce.cuh"
#include "triplet_resident.cuh"
#include "triplet_resident.h"

namespace hashengine {
namespace {

// Of the branch that pools an axis away.
struct ResidentAxis {
  const float* conv_weight;  // null: there is no such branch
  const float* bn_weight;
  const float* bn_bias;
  const float* mean;
  const float* var;
  bool turned;
};

template <typename T>
struct Resident {
  const T* x;
  T* y;
  Residence plan;
  ResidentAxis axis[3];
  double eps;
  float share;  // of a branch in the mean gate

  __device__ __forceinline__ bool has(int a) const { return axis[a].conv_weight != nullptr; }
};

template <typename T>
struct PoolTraits {
  using Value = T;
  static constexpr bool kHasMaximum = true;
};

// The convolutions' weights as memory's order of the maps wants them, and the gates of no branch.
template <typename T>
__device__ __forceinline__ void prepare(const Resident<T>& params, const ResidentBlock<T>& block) {
  const int size = params.plan.kernel_size, area = size * size;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    const ResidentAxis& axis = params.axis[a];
    for (int i = threadIdx.x; params.has(a) && i < 2 * area; i += blockDim.x) {
      const int row = i % area / size, column = i % size;
      block.weights(a)[i] = axis.conv_weight[i - i % area + (axis.turned ? column * size + row : i % area)];
    }
    const int gates = params.plan.inner(a) * (a == 0 ? params.plan.outer(a) : params.plan.tile[a]);
    for (int i = threadIdx.x; !params.has(a) && i < gates; i += blockDim.x) block.at(params.plan.gate[a])[i] = 0;
  }
}

// Maximum and sum of x along an axis of the block's slices: to emit(line, largest, sum), where a line is a vector of
// neighbours, and along A2 a single value. Lanes share a line, as many as keep the block busy: along A2 next to each
// other, else apart, so that a warp reads contiguous memory.
template <int kWidth, int kAxis, typename T, typename Emit>
__device__ __forceinline__ void pool(const ResidentBlock<T>& block, Emit emit) {
  constexpr int kLineWidth = kAxis == 2 ? 1 : kWidth, kFewestLanes = kAxis == 2 ? 8 : 1;
  const int row_vectors = block.plan.size[2] / kWidth, slice_vectors = block.plan.size[1] * row_vectors;
  const int lines = kAxis == 0 ? slice_vectors : block.slices() * (kAxis == 1 ? row_vectors : block.plan.size[1]);
  const int length = kAxis == 0 ? block.slices() : kAxis == 1 ? block.plan.size[1] : row_vectors;
  const int step = kAxis == 0 ? slice_vectors : kAxis == 1 ? row_vectors : 1;
  int lanes = 1;
  while (lanes < kWarpThreads && 2 * lanes <= length &&
         (lanes < kFewestLanes || lines * lanes < static_cast<int>(blockDim.x)))
    lanes *= 2;
  const int warp_lines = kWarpThreads / lanes, distance = kAxis == 2 ? 1 : warp_lines;
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads, warps = blockDim.x / kWarpThreads;
  const int part = lane / distance % lanes;

  for (int first = warp * warp_lines; first < lines; first += warps * warp_lines) {
    const int line = first + (kAxis == 2 ? lane / lanes : lane % warp_lines);
    const int begin =
        kAxis == 1 ? line / row_vectors * slice_vectors + line % row_vectors : line * (kAxis == 2 ? row_vectors : 1);
    Running<PoolTraits<T>, kWidth> running;
    const int end = line < lines ? length : 0;
#pragma unroll 4
    for (int i = part; i < end; i += lanes) running.add(vector_at<kWidth>(block.tile, (begin + i * step) * kWidth));
    Vector<float, kLineWidth> largest, sum;
#pragma unroll
    for (int i = 0; i < kLineWidth; ++i) {
      largest.at[i] = widen(running.largest.at[i]);
      sum.at[i] = running.sum[i];
    }
#pragma unroll
    for (int i = kLineWidth; i < kWidth; ++i) {
      largest.at[0] = maximum(largest.at[0], widen(running.largest.at[i]));
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

// The A1 and A2 maps to the block's rows of their planes, and what its slices have of the A0 map.
template <int kWidth, typename T>
__device__ __forceinline__ void pool_slices(const Resident<T>& params, const ResidentBlock<T>& block) {
  const Residence& plan = params.plan;
  if (params.has(0))
    pool<kWidth, 0>(block, [&](int line, const auto& largest, const auto& sum) {
      vector_at<kWidth>(block.at(plan.partial), line * kWidth) = largest;
      vector_at<kWidth>(block.at(plan.partial) + block.slice_numel(), line * kWidth) = sum;
    });
  const auto store = [&](int a, int row, int column, float largest, float sum) {
    float* value = block.at(plan.plane[a]) + block.plane_at(a, row, column);
    value[0] = largest;
    value[plan.area(a)] = sum / static_cast<float>(plan.size[a]);
  };
  const int row_vectors = plan.size[2] / kWidth;
  if (params.has(1))
    pool<kWidth, 1>(block, [&](int line, const auto& largest, const auto& sum) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        store(1, line / row_vectors, line % row_vectors * kWidth + i, largest.at[i], sum.at[i]);
    });
  if (params.has(2))
    pool<kWidth, 2>(block, [&](int line, const auto& largest, const auto& sum) {
      store(2, line / plan.size[1], line % plan.size[1], largest.at[0], sum.at[0]);
    });
}

// The rest of the plane from the cluster's other blocks, zeros outside of the map.
template <int kAxis, typename T>
__device__ __forceinline__ void fetch(const Resident<T>& params, const ResidentBlock<T>& block) {
  const Residence& plan = params.plan;
  if (!params.has(kAxis) || block.count[kAxis] == 0) return;
  const int pitch = plan.pitch(kAxis), border = plan.border(), inner = plan.inner(kAxis), tile = plan.tile[kAxis];
  float* plane = block.at(plan.plane[kAxis]);
  for (int at = threadIdx.x; at < (block.count[kAxis] + plan.kernel_size - 1) * pitch; at += blockDim.x) {
    const int row = at / pitch - border, column = at % pitch - border, outer = block.first[kAxis] + row;
    const bool is_inside = outer >= 0 && outer < plan.outer(kAxis) && column >= 0 && column < inner;
    if (kAxis > 0 && is_inside && row >= 0 && row < block.count[kAxis]) continue;  // pooled here
    float largest = 0, mean = 0;
    if (is_inside && kAxis > 0) {
      const float* source = map_to_rank(plane, outer / tile) + block.plane_at(kAxis, outer % tile, column);
      largest = source[0];
      mean = source[plan.area(kAxis)];
    } else if (is_inside) {
      largest = -INFINITY;
#pragma unroll 4
      for (int rank = 0; rank < plan.cluster; ++rank) {
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

// The gates of the block's rows. `task` counts the threads' work over all maps, 8 rows of a column each; what is beyond
// this map's is left for the next one.
template <int kAxis, int kSize, typename T>
__device__ __forceinline__ int make_gates(const Resident<T>& params, const ResidentBlock<T>& block, int task) {
  constexpr int kRows = MapTiling::kRows;
  const Residence& plan = params.plan;
  const ResidentAxis& axis = params.axis[kAxis];
  if (!params.has(kAxis)) return task;
  const int inner = plan.inner(kAxis), pitch = plan.pitch(kAxis), size = plan.kernel_size;
  const int tasks = ceil_div(block.count[kAxis], kRows) * inner;
  const float* weights = block.weights(kAxis);
  for (; task < tasks; task += blockDim.x) {
    const auto formula = GateFormula<float>::of(axis.mean, axis.var, axis.bn_weight, axis.bn_bias, params.eps);
    const int first = task / inner * kRows, column = task % inner;
    const float* window = block.at(plan.plane[kAxis]) + first * pitch + column;
    float responses[kRows] = {};
    correlate<kSize>(responses, window, pitch, weights, size);
    correlate<kSize>(responses, window + plan.area(kAxis), pitch, weights + size * size, size);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= block.count[kAxis]) break;
      const float gate = params.share * formula.gate(responses[r]);
      float* gates = block.at(plan.gate[kAxis]);
      if constexpr (kAxis > 0) {
        gates[(first + r) * inner + column] = gate;
      } else {
        for (int rank = 0; rank < plan.cluster; ++rank)
          map_to_rank(gates, rank)[(block.first[0] + first + r) * inner + column] = gate;
      }
    }
  }
  return task - tasks;
}

// y of the block's slices. A thread keeps to a position while it goes through them, as in triplet_apply.cuh.
template <int kWidth, typename T>
__device__ __forceinline__ void apply_gates(const Resident<T>& params, const ResidentBlock<T>& block) {
  constexpr bool kIsDirect = kWidth * sizeof(T) == kVectorBytes;  // narrower ones leave through shared memory
  const int rows = params.plan.size[1], columns = params.plan.size[2], row_vectors = columns / kWidth;
  const int positions = rows * row_vectors, threads = blockDim.x, thread = threadIdx.x;
  const int slots = max(1, threads / positions), slot = slots > 1 ? thread / positions : 0;
  const float* gates[3];
#pragma unroll
  for (int a = 0; a < 3; ++a) gates[a] = block.at(params.plan.gate[a]);
  T* out = kIsDirect ? params.y + block.begin() : block.tile;

  for (int position = thread - slot * positions; slot < slots && position < positions; position += threads) {
    const int row = position / row_vectors, column = position % row_vectors * kWidth;
    const Vector<float, kWidth> kept = vector_at<kWidth>(gates[0], position * kWidth);
#pragma unroll 2
    for (int slice = slot; slice < block.slices(); slice += slots) {
      const int offset = (slice * positions + position) * kWidth;
      Vector<T, kWidth> values = vector_at<kWidth>(block.tile, offset);
      const Vector<float, kWidth> column_gates = vector_at<kWidth>(gates[1], slice * columns + column);
      const float row_gate = gates[2][slice * rows + row];
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        values.at[i] = narrow<T>(widen(values.at[i]) * (kept.at[i] + column_gates.at[i] + row_gate));
      vector_at<kWidth>(out, offset) = values;
    }
  }
  if constexpr (!kIsDirect) {
    __syncthreads();
    unstage(block.tile, block.numel(), params.y + block.begin());
  }
}

template <typename T, int kWidth, int kSize>
__global__ void __launch_bounds__(kResidentThreads, 2) resident_kernel(Resident<T> params) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const ResidentBlock<T> block(params.plan);
  stage(params.x + block.begin(), block.numel(), block.tile);
  prepare(params, block);  // while x is on its way
  wait_for_staged();
  pool_slices<kWidth>(params, block);
  cluster_sync();  // the maps can be fetched
  fetch<0>(params, block);
  fetch<1>(params, block);
  fetch<2>(params, block);
  __syncthreads();
  int task = static_cast<int>(threadIdx.x);
  task = make_gates<0, kSize>(params, block, task);
  task = make_gates<1, kSize>(params, block, task);
  make_gates<2, kSize>(params, block, task);
  cluster_sync();  // all gates are there, and no block reads another's memory any more
  apply_gates<kWidth>(params, block);
#endif
}

}  // namespace

bool triplet_is_resident(const TripletShape& shape) { return Residence::of(shape).cluster > 0; }

void launch_triplet_resident(const TripletInference& params, int width, cudaStream_t stream) {
  const TripletGeometry geometry = TripletGeometry::of(params.shape);
  const Residence plan = Residence::of(params.shape);
  with_element<float>(params.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    Resident<T> resident{static_cast<const T*>(params.x),
                         static_cast<T*>(params.y),
                         plan,
                         {},
                         params.parameters.eps,
                         1.0f / static_cast<float>(geometry.branches)};
    for (int a = 0; a < 3; ++a) {
      const int branch = geometry.axis[a].branch;
      if (branch < 0) continue;
      const auto floats = [&](const void* const* list) { return static_cast<const float*>(list[branch]); };
      resident.axis[a] = {
          floats(params.parameters.conv_weight), floats(params.parameters.bn_weight), floats(params.parameters.bn_bias),
          floats(params.running_mean),           floats(params.running_var),          geometry.axis[a].turned};
    }
    with_vector_width<T>(width, [&](auto vector) {
      constexpr int kWidth = decltype(vector)::value;
      launch(params.shape.kernel_size == 7 ? resident_kernel<T, kWidth, 7> : resident_kernel<T, kWidth, 0>,
             {geometry.samples * plan.cluster, plan.threads, plan.bytes, plan.cluster}, stream, resident);
    });
  });
}

}  // namespace hashengine
