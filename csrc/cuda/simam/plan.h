// How launch_simam_forward and launch_simam_backward (simam.cu) divide a feature map among blocks and threads, and the
// launchers of the three ways to process it.
#pragma once

#include "hashengine/simam.h"

namespace hashengine::simam {

// The number of vectors that a thread holds in registers. A vector has `width` elements: 16 bytes, or a single element.
constexpr int fragment_vectors(int width, int element_bytes) { return width > 1 ? 4 : element_bytes == 8 ? 8 : 16; }

// The largest number of threads per block of a kernel for slabs (see below). A thread of an NHWC kernel also needs
// registers for the sums of several channels, so its block has fewer threads. If vectors have a single element, the
// NHWC kernels also process the slabs of NCHW (with_fragment in slab.cuh).
constexpr int max_block_threads(FeatureLayout layout, int width) {
  return layout == FeatureLayout::kContiguous && width > 1 ? 512 : 256;
}

// --- in_warp.cu: NCHW planes that fit into the registers of one warp ---

// A team is the group of adjacent lanes that processes one plane.
struct WarpPlan {
  int64_t planes;
  int team_log2;   // log2 of the number of lanes per team
  bool is_staged;  // whether planes are copied through shared memory
};
void launch_in_warp_forward(const SimamForward& params, const WarpPlan& plan, cudaStream_t stream);
void launch_in_warp_backward(const SimamBackward& params, const WarpPlan& plan, cudaStream_t stream);

// --- slabs ---

// A slab is a part of the feature map that contains whole channel planes, arranged in rows of vectors. In NCHW a slab
// is one plane, and a row is one vector. In NHWC a slab is a few adjacent channels, and a row is one position. A slab
// is cut into parts of consecutive rows, one part per block.
struct SlabPlan {
  int64_t count;          // the number of slabs, of all samples
  int64_t sample_stride;  // in elements, like all strides
  int64_t slab_stride;    // between the slabs of a sample
  int64_t row_stride;
  int64_t rows;      // per slab
  int64_t channels;  // per sample
  unsigned slabs_per_sample;
  unsigned parts;     // per slab
  int part_rows;      // per part; the last part of a slab can have fewer
  int columns_log2;   // log2 of the number of vectors per row; the last vectors can lie beyond the last channel
  int threads;        // per block: whole warps and whole rows
  int width;          // elements per vector
  int slab_channels;  // channels per slab

  int64_t blocks() const { return count * parts; }
};

// --- in_cluster.cu: the parts of a slab are the blocks of one cluster ---

// Whether the current device can run both kernels in clusters of plan.parts blocks.
bool can_run_in_cluster(const SimamShape& shape, const SlabPlan& plan);
void launch_in_cluster_forward(const SimamForward& params, const SlabPlan& plan, cudaStream_t stream);
void launch_in_cluster_backward(const SimamBackward& params, const SlabPlan& plan, cudaStream_t stream);

// --- split.cu: the blocks store the sums of the parts in the workspace, and another kernel merges them ---

int64_t split_workspace_bytes(const SlabPlan& plan, const SimamShape& shape);
void launch_split_forward(const SimamForward& params, const SlabPlan& plan, void* workspace, cudaStream_t stream);
void launch_split_backward(const SimamBackward& params, const SlabPlan& plan, void* workspace, cudaStream_t stream);

}  // namespace hashengine::simam
