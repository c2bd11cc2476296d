// SimAM on the GPU: which of the three ways a feature map takes, by its layout and by the size of a plane.
//
//   simam_small.cu    NCHW planes that fit in a warp: one launch, 2Ns forward and 3Ns backward, the floors
//   simam_on_chip.cu  NCHW planes, and NHWC slabs of channels, that fit in a cluster of blocks: the same
//   simam_split.cu    what is larger: three launches, 3Ns and 5Ns
//
// All of them hold x in registers, take the mean first and the squares around it, and work in float32 (float64 for
// float64) in an order that depends on the shape alone. A NaN spoils its plane and no other.

#include <algorithm>

#include "hashengine/simam.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "simam_launch.h"
#include "vec.cuh"

namespace hashengine {
namespace {

constexpr int64_t kClusterBlocks = 8;    // at most; a power of two
constexpr int64_t kRowBytes = 64;        // of an NHWC slab, where that stays on chip
constexpr int64_t kSplitRowBytes = 256;  // and where it is split anyway
constexpr int64_t kSectorBytes = 32;
constexpr int64_t kLeastVectors = 512;  // of a slab, where there are channels enough

int element_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// float64 goes one by one.
int full_width(Dtype dtype) { return dtype == Dtype::kFloat64 ? 1 : kVectorBytes / element_bytes(dtype); }

int ceil_log2(int64_t value) {
  int log2 = 0;
  while (int64_t{1} << log2 < value) ++log2;
  return log2;
}

int held_vectors(const SimamShape& shape, int width) { return simam_held_vectors(width, element_bytes(shape.dtype)); }

bool is_contiguous(const SimamShape& shape) { return shape.layout == FeatureLayout::kContiguous; }

// In a map of one channel, or of one position, both layouts are the same.
SimamShape simplified(SimamShape shape) {
  if (shape.channels == 1 || shape.positions == 1) shape.layout = FeatureLayout::kContiguous;
  return shape;
}

int width_of(const SimamShape& shape, bool is_aligned) {
  const int width = full_width(shape.dtype);
  const int64_t run = is_contiguous(shape) ? shape.positions : shape.channels;
  return is_aligned && run % width == 0 ? width : 1;
}

bool fits_in_warp(const SimamShape& shape, int width) {
  return is_contiguous(shape) && shape.positions / width <= kWarpThreads * held_vectors(shape, width);
}

SimamSmall small(const SimamShape& shape, int width) {
  const int64_t vectors = shape.positions / width;
  // Two lanes at least read a sector together.
  const int64_t lanes =
      std::max(ceil_div<int64_t>(vectors, held_vectors(shape, width)), std::min<int64_t>(vectors, width > 1 ? 2 : 1));
  return {shape.samples * shape.channels, ceil_log2(lanes), width == 1 && full_width(shape.dtype) > 1};
}

// Rows that a block can hold.
int rows_of_block(const SimamShape& shape, const SimamSlabs& slabs) {
  return (simam_block_threads(shape.layout, slabs.width) >> slabs.columns_log2) * held_vectors(shape, slabs.width);
}

// Slabs of 2^columns_log2 vectors a row, cut into `parts`.
SimamSlabs slabs_of(const SimamShape& shape, int width, int columns_log2) {
  const int64_t columns = int64_t{1} << columns_log2;
  SimamSlabs slabs{};
  slabs.sample_stride = shape.channels * shape.positions;
  slabs.channels = shape.channels;
  slabs.columns_log2 = columns_log2;
  slabs.width = width;
  if (is_contiguous(shape)) {
    slabs.per_sample = static_cast<unsigned>(shape.channels);
    slabs.slab_stride = shape.positions;
    slabs.row_stride = width;
    slabs.rows = shape.positions / width;
    slabs.slab_channels = 1;
  } else {
    slabs.per_sample = static_cast<unsigned>(ceil_div(shape.channels, columns * width));
    slabs.slab_stride = columns * width;
    slabs.row_stride = shape.channels;
    slabs.rows = shape.positions;
    slabs.slab_channels = static_cast<int>(columns) * width;
  }
  slabs.count = shape.samples * slabs.per_sample;
  return slabs;
}

SimamSlabs cut(const SimamShape& shape, SimamSlabs slabs, int64_t parts) {
  const int64_t columns = int64_t{1} << slabs.columns_log2;
  slabs.parts = static_cast<unsigned>(parts);
  slabs.part_rows = static_cast<int>(ceil_div(slabs.rows, parts));
  const int64_t threads = ceil_div<int64_t>(slabs.part_rows, held_vectors(shape, slabs.width)) * columns;
  const int64_t unit = std::max<int64_t>(columns, kWarpThreads);
  slabs.threads = static_cast<int>(ceil_div(threads, unit) * unit);
  return slabs;
}

// Columns of a slab whose rows have `bytes`, but no more than there are channels.
int columns_log2_of(const SimamShape& shape, int width, int64_t bytes) {
  if (is_contiguous(shape)) return 0;
  const int64_t columns = std::max<int64_t>(bytes / (width * element_bytes(shape.dtype)), 1);
  return std::min(ceil_log2(columns), ceil_log2(ceil_div<int64_t>(shape.channels, width)));
}

// Slabs that stay on chip, or none (count = 0).
SimamSlabs on_chip_slabs(const SimamShape& shape, int width) {
  const int64_t most_parts = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? kClusterBlocks : 1;
  for (const int64_t row_bytes : {kRowBytes, kSectorBytes}) {
    SimamSlabs slabs = slabs_of(shape, width, columns_log2_of(shape, width, row_bytes));
    // Short slabs are made wide enough to give a block something to do.
    while (!is_contiguous(shape) && slabs.per_sample > 1 && slabs.rows << slabs.columns_log2 < kLeastVectors)
      slabs = slabs_of(shape, width, slabs.columns_log2 + 1);
    for (int64_t parts = 1; parts <= most_parts; parts *= 2)
      if (ceil_div(slabs.rows, parts) <= rows_of_block(shape, slabs)) return cut(shape, slabs, parts);
  }
  return {};
}

SimamSlabs split_slabs(const SimamShape& shape, int width) {
  const SimamSlabs slabs = slabs_of(shape, width, columns_log2_of(shape, width, kSplitRowBytes));
  return cut(shape, slabs, ceil_div<int64_t>(slabs.rows, rows_of_block(shape, slabs)));
}

bool is_empty(const SimamShape& shape) { return shape.samples * shape.channels * shape.positions == 0; }

template <typename Params, typename Small, typename OnChip, typename Split>
void choose(Params params, bool is_aligned, Small launch_small, OnChip launch_on_chip, Split launch_split) {
  if (is_empty(params.shape)) return;
  params.shape = simplified(params.shape);
  const int width = width_of(params.shape, is_aligned);
  if (fits_in_warp(params.shape, width)) return launch_small(params, small(params.shape, width));
  const SimamSlabs slabs = on_chip_slabs(params.shape, width);
  if (slabs.count > 0) return launch_on_chip(params, slabs);
  launch_split(params, split_slabs(params.shape, width));
}

// Pointers are not known yet: enough for vectors and for single elements.
int64_t workspace_bytes(SimamShape shape) {
  if (is_empty(shape)) return 0;
  shape = simplified(shape);
  int64_t bytes = 0;
  for (const bool is_aligned : {true, false}) {
    const int width = width_of(shape, is_aligned);
    if (fits_in_warp(shape, width) || on_chip_slabs(shape, width).count > 0) continue;
    bytes = std::max(bytes, simam_split_workspace_bytes(split_slabs(shape, width), shape));
  }
  return bytes;
}

}  // namespace

int64_t simam_forward_workspace_bytes(const SimamShape& shape) { return workspace_bytes(shape); }
int64_t simam_backward_workspace_bytes(const SimamShape& shape) { return workspace_bytes(shape); }

void launch_simam_forward(const SimamForward& params, void* workspace, cudaStream_t stream) {
  choose(
      params, is_aligned(params.x) && is_aligned(params.y),
      [&](const auto& p, const SimamSmall& small) { launch_simam_small_forward(p, small, stream); },
      [&](const auto& p, const SimamSlabs& slabs) { launch_simam_on_chip_forward(p, slabs, stream); },
      [&](const auto& p, const SimamSlabs& slabs) { launch_simam_split_forward(p, slabs, workspace, stream); });
}

void launch_simam_backward(const SimamBackward& params, void* workspace, cudaStream_t stream) {
  choose(
      params, is_aligned(params.x) && is_aligned(params.grad_y) && is_aligned(params.grad_x),
      [&](const auto& p, const SimamSmall& small) { launch_simam_small_backward(p, small, stream); },
      [&](const auto& p, const SimamSlabs& slabs) { launch_simam_on_chip_backward(p, slabs, stream); },
      [&](const auto& p, const SimamSlabs& slabs) { launch_simam_split_backward(p, slabs, workspace, stream); });
}

}  // namespace hashengine
