// How a cluster of blocks divides a sample in cluster_inference.cu: which part of x and of the maps each block holds,
// and where it is in the block's shared memory. tiles.cuh defines the axes A0, A1 and A2, slice, and the outer axis of
// a map.
#pragma once

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/workspace.h"
#include "cuda/triplet/map_tiles.cuh"
#include "cuda/triplet/tiles.cuh"

namespace hashengine::triplet {

constexpr int kMaxClusterThreads = 512;  // per block

// A block holds slices of x, [block_rows[1]][A1][A2], and block_rows[a] outer rows of the map of each axis a. The outer
// rows of the A0 map are indexed by A1. The outer rows of the A1 and A2 maps are indexed by A0, like the slices.
struct ClusterPlan {
  int size[3];  // the sizes of A0, A1, A2
  int block_rows[3];
  int blocks;  // blocks per cluster; a cluster processes one sample. 0: there is no plan
  int kernel_size;
  int threads;  // per block
  // Offsets in a block's shared memory, in floats. x is stored at offset 0.
  int weights;
  int partial;   // maxima and sums of the A0 map over the block's own slices, [2][A1][A2]
  int plane[3];  // maximum and mean, [2][rows][columns]: the block's own rows and the border that the convolution reads
  int gate[3];   // [rows][columns]: all rows of the A0 map, but only the block's own rows of the other maps
  int64_t bytes;

  bool exists() const { return blocks > 0; }

  HE_HOST_DEVICE int border() const { return kernel_size / 2; }
  HE_HOST_DEVICE int outer(int a) const { return size[a == 0 ? 1 : 0]; }
  HE_HOST_DEVICE int inner(int a) const { return size[a == 2 ? 1 : 2]; }
  HE_HOST_DEVICE int pitch(int a) const { return inner(a) + kernel_size - 1; }
  // The number of values of one channel (maximum or mean) of `plane`. Rows are rounded up because `correlate` reads
  // kRows rows per thread.
  HE_HOST_DEVICE int area(int a) const {
    return (ceil_div(block_rows[a], MapTiling::kRows) * MapTiling::kRows + kernel_size - 1) * pitch(a);
  }

  // Chooses the smallest cluster with which two blocks fit into a multiprocessor, so that one block loads while the
  // other computes. If this would leave multiprocessors idle because the batch is small, it chooses a larger cluster.
  // If two blocks do not fit with any cluster, it chooses the largest. There is no plan if not even one block fits, if
  // the three launches of the forward are estimated to be faster, or for float64. has_cluster_inference() (passes.h)
  // also asks whether the device can run the cluster.
  static ClusterPlan make(const TripletShape& shape) {
    constexpr int kMaxBlocks = 8, kMinSlices = 8;
    const Geometry geometry = Geometry::from_shape(shape);
    const int64_t max_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t element_bytes = shape.dtype == Dtype::kFloat32 ? 4 : 2;
    const int64_t sample_bytes = geometry.size[0] * geometry.size[1] * geometry.size[2] * element_bytes;
    if (shape.dtype == Dtype::kFloat64 || sample_bytes > kMaxBlocks * max_bytes) return {};
    ClusterPlan plan{};
    for (int blocks = 1; blocks <= kMaxBlocks; blocks *= 2) {
      plan = divide(geometry, shape.kernel_size, element_bytes, blocks);
      const bool can_spread =
          2 * blocks * geometry.samples <= multiprocessors && 2 * blocks * kMinSlices <= geometry.size[0];
      if (plan.blocks_per_sm(max_bytes) >= 2 && !can_spread) break;
    }
    const bool is_faster = plan.is_faster_than_three_launches(geometry.samples, sample_bytes,
                                                              plan.blocks_per_sm(max_bytes), multiprocessors);
    return is_faster ? plan : ClusterPlan{};
  }

 private:
  // A block can request all shared memory of a multiprocessor except kReservedBytes, and occupies kReservedBytes in
  // addition to its request. The kernel uses at most 64 registers per thread, so a multiprocessor can run kMaxThreads
  // threads.
  int64_t blocks_per_sm(int64_t max_bytes) const {
    constexpr int64_t kReservedBytes = 1 << 10, kMaxThreads = 1024;
    return std::min((max_bytes + kReservedBytes) / (bytes + kReservedBytes), kMaxThreads / threads);
  }

  // A block needs some microseconds for latencies and for the maps, whatever the size of x. If there is too little x to
  // move in this time (a small sample with many channels), the three launches are faster. This does not apply if all
  // blocks run at the same time. The times are estimated, not measured.
  bool is_faster_than_three_launches(int64_t samples, int64_t sample_bytes, int64_t resident_blocks,
                                     int64_t multiprocessors) const {
    constexpr int64_t kMinBytesPerSm = 48 << 10;  // bytes of x
    return resident_blocks > 0 && (samples * blocks <= multiprocessors * resident_blocks ||
                                   sample_bytes / blocks * resident_blocks >= kMinBytesPerSm);
  }

  static ClusterPlan divide(const Geometry& geometry, int kernel_size, int64_t element_bytes, int blocks) {
    ClusterPlan plan{};
    for (int a = 0; a < 3; ++a) plan.size[a] = static_cast<int>(geometry.size[a]);
    plan.blocks = blocks;
    plan.kernel_size = kernel_size;
    for (int a = 0; a < 3; ++a) plan.block_rows[a] = ceil_div(plan.outer(a), blocks);
    const int64_t slice_numel = geometry.size[1] * geometry.size[2];
    const int64_t x_bytes = plan.block_rows[1] * slice_numel * element_bytes;
    constexpr int64_t kBytesPerThread = 4 * kVectorBytes, kMinThreads = 128;
    const int64_t threads = ceil_div(x_bytes, kBytesPerThread * kWarpThreads) * kWarpThreads;
    plan.threads = static_cast<int>(std::clamp<int64_t>(threads, kMinThreads, kMaxClusterThreads));

    Workspace shared_memory(nullptr);
    const auto take = [&](int64_t floats) {
      const auto offset = static_cast<int>(shared_memory.bytes() / static_cast<int64_t>(sizeof(float)));
      shared_memory.take<float>(floats);
      return offset;
    };
    shared_memory.take<char>(x_bytes);
    plan.weights = take(3 * 2 * kernel_size * kernel_size);
    if (geometry.axis[0].branch >= 0) plan.partial = take(2 * slice_numel);
    for (int a = 0; a < 3; ++a) {
      if (geometry.axis[a].branch >= 0) plan.plane[a] = take(int64_t{2} * plan.area(a));
      plan.gate[a] = take(int64_t{plan.inner(a)} * (a == 0 ? plan.size[1] : plan.block_rows[a]));
    }
    plan.bytes = shared_memory.bytes();
    return plan;
  }
};

}  // namespace hashengine::triplet
