// simam on the GPU. This file chooses one of three ways to process a feature map of N elements of s bytes. The choice
// depends on the layout, on the size of a plane and on the alignment of the arrays. plan.h defines a slab.
//
//   in_warp.cu     NCHW planes that fit into a warp: one launch; moves 2Ns bytes forward, 3Ns backward, the floors
//   in_cluster.cu  NCHW planes and NHWC slabs that fit into a cluster of blocks: also one launch, with the same traffic
//   split.cu       everything larger: three launches; moves 3Ns bytes forward and 5Ns backward
//
// All of them hold x in registers. They compute the mean first, and then the squares of the deviations from it. Sums
// are in float32 (float64 for float64); split.cu merges them in float64. The launch plan fixes the order of the
// additions. A NaN affects its own plane only.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/simam/plan.h"
#include "hashengine/simam.h"

namespace hashengine {
namespace {

using namespace simam;

constexpr int64_t kMaxClusterBlocks = 8;  // a power of two
// The bytes per row of an NHWC slab should be whole sectors of memory, because a row is contiguous but the next row is
// not adjacent to it.
constexpr int64_t kSectorBytes = 32;
constexpr int64_t kClusterRowBytes = 64;  // in_cluster.cu; kSectorBytes if slabs with 64 bytes per row do not fit
constexpr int64_t kSplitRowBytes = 256;   // split.cu
constexpr int64_t kMinSlabVectors = 512;  // in_cluster.cu, NHWC: a slab has fewer only if there are too few channels

int element_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// The number of elements of a 16-byte vector; 1 for float64, which is always processed one element at a time.
int full_width(Dtype dtype) { return dtype == Dtype::kFloat64 ? 1 : kVectorBytes / element_bytes(dtype); }

int ceil_log2(int64_t value) {
  int log2 = 0;
  while (int64_t{1} << log2 < value) ++log2;
  return log2;
}

int thread_vectors(const SimamShape& shape, int width) { return fragment_vectors(width, element_bytes(shape.dtype)); }

bool is_contiguous(const SimamShape& shape) { return shape.layout == FeatureLayout::kContiguous; }

// If a map has only one channel or only one position, both layouts are the same; it is then treated as NCHW.
SimamShape simplified(SimamShape shape) {
  if (shape.channels == 1 || shape.positions == 1) shape.layout = FeatureLayout::kContiguous;
  return shape;
}

int vector_width(const SimamShape& shape, bool are_aligned) {
  const int width = full_width(shape.dtype);
  const int64_t row_elements = is_contiguous(shape) ? shape.positions : shape.channels;
  return are_aligned && row_elements % width == 0 ? width : 1;
}

bool fits_in_warp(const SimamShape& shape, int width) {
  return is_contiguous(shape) && shape.positions / width <= kWarpThreads * thread_vectors(shape, width);
}

WarpPlan warp_plan(const SimamShape& shape, int width) {
  const int64_t vectors = shape.positions / width;
  // At least two lanes per team (the lanes that process one plane): two vectors fill a sector of memory.
  const int64_t lanes =
      std::max(ceil_div<int64_t>(vectors, thread_vectors(shape, width)), std::min<int64_t>(vectors, width > 1 ? 2 : 1));
  return {shape.samples * shape.channels, ceil_log2(lanes), width == 1 && full_width(shape.dtype) > 1};
}

int max_block_rows(const SimamShape& shape, const SlabPlan& plan) {
  return (max_block_threads(shape.layout, plan.width) >> plan.columns_log2) * thread_vectors(shape, plan.width);
}

// Slabs with 2^columns_log2 vectors per row, not yet cut into parts: cut() sets the remaining fields.
SlabPlan uncut_slabs(const SimamShape& shape, int width, int columns_log2) {
  const int64_t columns = int64_t{1} << columns_log2;
  SlabPlan plan{};
  plan.sample_stride = shape.channels * shape.positions;
  plan.channels = shape.channels;
  plan.columns_log2 = columns_log2;
  plan.width = width;
  if (is_contiguous(shape)) {
    plan.slabs_per_sample = static_cast<unsigned>(shape.channels);
    plan.slab_stride = shape.positions;
    plan.row_stride = width;
    plan.rows = shape.positions / width;
    plan.slab_channels = 1;
  } else {
    plan.slabs_per_sample = static_cast<unsigned>(ceil_div(shape.channels, columns * width));
    plan.slab_stride = columns * width;
    plan.row_stride = shape.channels;
    plan.rows = shape.positions;
    plan.slab_channels = static_cast<int>(columns) * width;
  }
  plan.count = shape.samples * plan.slabs_per_sample;
  return plan;
}

SlabPlan cut(const SimamShape& shape, SlabPlan plan, int64_t parts) {
  const int64_t columns = int64_t{1} << plan.columns_log2;
  plan.parts = static_cast<unsigned>(parts);
  plan.part_rows = static_cast<int>(ceil_div(plan.rows, parts));
  const int64_t threads = ceil_div<int64_t>(plan.part_rows, thread_vectors(shape, plan.width)) * columns;
  const int64_t unit = std::max<int64_t>(columns, kWarpThreads);
  plan.threads = static_cast<int>(ceil_div(threads, unit) * unit);
  return plan;
}

// The log2 of the number of vectors in a slab's row of `row_bytes` bytes; smaller if there are fewer channels.
int row_columns_log2(const SimamShape& shape, int width, int64_t row_bytes) {
  if (is_contiguous(shape)) return 0;
  const int64_t columns = std::max<int64_t>(row_bytes / (width * element_bytes(shape.dtype)), 1);
  return std::min(ceil_log2(columns), ceil_log2(ceil_div<int64_t>(shape.channels, width)));
}

// The result has count = 0 if no cluster that the device can run can hold a slab.
SlabPlan cluster_plan(const SimamShape& shape, int width) {
  for (const int64_t row_bytes : {kClusterRowBytes, kSectorBytes}) {
    SlabPlan plan = uncut_slabs(shape, width, row_columns_log2(shape, width, row_bytes));
    // If a slab has too few rows, it is widened until it has enough vectors for a block.
    while (!is_contiguous(shape) && plan.slabs_per_sample > 1 && plan.rows << plan.columns_log2 < kMinSlabVectors)
      plan = uncut_slabs(shape, width, plan.columns_log2 + 1);
    int64_t parts = 1;
    while (parts <= kMaxClusterBlocks && ceil_div(plan.rows, parts) > max_block_rows(shape, plan)) parts *= 2;
    if (parts > kMaxClusterBlocks) continue;
    plan = cut(shape, plan, parts);
    if (can_run_in_cluster(shape, plan)) return plan;
  }
  return {};
}

SlabPlan split_plan(const SimamShape& shape, int width) {
  const SlabPlan plan = uncut_slabs(shape, width, row_columns_log2(shape, width, kSplitRowBytes));
  return cut(shape, plan, ceil_div<int64_t>(plan.rows, max_block_rows(shape, plan)));
}

bool is_empty(const SimamShape& shape) { return shape.samples * shape.channels * shape.positions == 0; }

template <typename Params, typename InWarp, typename InCluster, typename Split>
void choose(Params params, bool are_aligned, InWarp launch_in_warp, InCluster launch_in_cluster, Split launch_split) {
  if (is_empty(params.shape)) return;
  params.shape = simplified(params.shape);
  const int width = vector_width(params.shape, are_aligned);
  if (fits_in_warp(params.shape, width)) return launch_in_warp(params, warp_plan(params.shape, width));
  const SlabPlan plan = cluster_plan(params.shape, width);
  if (plan.count > 0) return launch_in_cluster(params, plan);
  launch_split(params, split_plan(params.shape, width));
}

// Enough bytes for both widths, that of a vector and one element: the alignment of the arrays is not known yet.
int64_t workspace_bytes(SimamShape shape) {
  if (is_empty(shape)) return 0;
  shape = simplified(shape);
  int64_t bytes = 0;
  for (const bool are_aligned : {true, false}) {
    const int width = vector_width(shape, are_aligned);
    if (fits_in_warp(shape, width) || cluster_plan(shape, width).count > 0) continue;
    bytes = std::max(bytes, split_workspace_bytes(split_plan(shape, width), shape));
  }
  return bytes;
}

}  // namespace

int64_t simam_forward_workspace_bytes(const SimamShape& shape) { return workspace_bytes(shape); }
int64_t simam_backward_workspace_bytes(const SimamShape& shape) { return workspace_bytes(shape); }

void launch_simam_forward(const SimamForward& params, void* workspace, cudaStream_t stream) {
  choose(
      params, is_aligned(params.x) && is_aligned(params.y),
      [&](const auto& p, const WarpPlan& plan) { launch_in_warp_forward(p, plan, stream); },
      [&](const auto& p, const SlabPlan& plan) { launch_in_cluster_forward(p, plan, stream); },
      [&](const auto& p, const SlabPlan& plan) { launch_split_forward(p, plan, workspace, stream); });
}

void launch_simam_backward(const SimamBackward& params, void* workspace, cudaStream_t stream) {
  choose(
      params, is_aligned(params.x) && is_aligned(params.grad_y) && is_aligned(params.grad_x),
      [&](const auto& p, const WarpPlan& plan) { launch_in_warp_backward(p, plan, stream); },
      [&](const auto& p, const SlabPlan& plan) { launch_in_cluster_backward(p, plan, stream); },
      [&](const auto& p, const SlabPlan& plan) { launch_split_backward(p, plan, workspace, stream); });
}

}  // namespace hashengine
