// How launch_simam_forward and launch_simam_backward (simam.cu) choose between the three ways to run them.
#pragma once

#include "hashengine/simam.h"

namespace hashengine {

// What the kernels hold and the schedules reckon with. `width`: elements of a vector, 1 or 16 bytes' worth.
constexpr int simam_held_vectors(int width, int element_bytes) { return width > 1 ? 4 : element_bytes == 8 ? 8 : 16; }

// Threads of a block, at most. In NHWC the sums of many channels take registers too.
constexpr int simam_block_threads(FeatureLayout layout, int width) {
  return layout == FeatureLayout::kContiguous && width > 1 ? 512 : 256;
}

// NCHW planes that one warp can hold: simam_small.cu.
struct SimamSmall {
  int64_t planes;
  int team_log2;   // lanes a plane
  bool is_staged;  // through shared memory, element by element
};
void launch_simam_small_forward(const SimamForward& params, const SimamSmall& small, cudaStream_t stream);
void launch_simam_small_backward(const SimamBackward& params, const SimamSmall& small, cudaStream_t stream);

// How planes are dealt out to blocks. A slab is what statistics can be taken of without looking elsewhere, as rows of
// vectors: in NCHW one plane, a vector a row; in NHWC all positions of a few neighbouring channels, a position a row. A
// slab is cut into parts of consecutive rows, a block each.
struct SimamSlabs {
  int64_t count;          // of all samples
  int64_t sample_stride;  // elements, as all strides
  int64_t slab_stride;    // within a sample
  int64_t row_stride;
  int64_t rows;         // of a slab
  int64_t channels;     // of a sample
  unsigned per_sample;  // slabs
  unsigned parts;       // of a slab
  int part_rows;
  int columns_log2;  // vectors in a row: a power of two, some of which may lie beyond the last channel
  int threads;       // of a block: whole warps and whole rows
  int width;         // elements of a vector
  int slab_channels;

  int64_t blocks() const { return count * parts; }
};

// The parts of a slab are one cluster: simam_on_chip.cu.
void launch_simam_on_chip_forward(const SimamForward& params, const SimamSlabs& slabs, cudaStream_t stream);
void launch_simam_on_chip_backward(const SimamBackward& params, const SimamSlabs& slabs, cudaStream_t stream);

// The parts of a slab leave their sums in the workspace: simam_split.cu.
int64_t simam_split_workspace_bytes(const SimamSlabs& slabs, const SimamShape& shape);
void launch_simam_split_forward(const SimamForward& params, const SimamSlabs& slabs, void* workspace,
                                cudaStream_t stream);
void launch_simam_split_backward(const SimamBackward& params, const SimamSlabs& slabs, void* workspace,
                                 cudaStream_t stream);

}  // namespace hashengine
