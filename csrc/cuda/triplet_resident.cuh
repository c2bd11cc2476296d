// How a cluster of blocks shares a sample in triplet_resident.cu: who has which part of x and of the maps, and where it
// lies in shared memory.
#pragma once

#include "cluster.cuh"
#include "reduce.cuh"
#include "triplet_kernels.h"

namespace hashengine {

constexpr int kResidentThreads = 512;  // at most

// A block has slices of x, [tile[1]][A1][A2], and `tile` outer rows of each axis' map: lines along A1 of the A0 map,
// its own slices of the two others. Maps are named by the axis that they pool.
struct Residence {
  int size[3];  // A0, A1, A2
  int tile[3];
  int cluster;  // blocks that share a sample; 0: it takes the three launches
  int kernel_size;
  int threads;
  int weights;   // here and below: where it begins in shared memory, in floats
  int partial;   // maxima and sums over the block's slices, [2][A1][A2]
  int plane[3];  // maximum and mean, [2][rows][columns], the block's rows with the border that the convolution reads
  int gate[3];   // [rows][columns]: all of the A0 map's rows, the block's own of the others
  int64_t bytes;

  HE_HOST_DEVICE int border() const { return kernel_size / 2; }
  HE_HOST_DEVICE int outer(int a) const { return size[a == 0 ? 1 : 0]; }
  HE_HOST_DEVICE int inner(int a) const { return size[a == 2 ? 1 : 2]; }
  HE_HOST_DEVICE int pitch(int a) const { return inner(a) + kernel_size - 1; }
  // Of one channel of a plane. `correlate` reads the rows of whole threads.
  HE_HOST_DEVICE int area(int a) const {
    return (ceil_div(tile[a], MapTiling::kRows) * MapTiling::kRows + kernel_size - 1) * pitch(a);
  }

  // The smallest cluster of which two blocks fit into a multiprocessor, one of them loading while the other computes,
  // and more blocks where the batch would leave multiprocessors idle; or the largest cluster, if it fits at all.
  static Residence of(const TripletShape& shape) {
    constexpr int kLargestCluster = 8, kFewestSlices = 8;
    const TripletGeometry geometry = TripletGeometry::of(shape);
    const int64_t most_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const int64_t element_bytes = shape.dtype == Dtype::kFloat32 ? 4 : 2;
    const int64_t sample_bytes = geometry.size[0] * geometry.size[1] * geometry.size[2] * element_bytes;
    if (shape.dtype == Dtype::kFloat64 || device_attribute(cudaDevAttrComputeCapabilityMajor) < 9 ||
        sample_bytes > kLargestCluster * most_bytes)
      return {};
    Residence plan{};
    for (int cluster = 1; cluster <= kLargestCluster; cluster *= 2) {
      plan = cut(geometry, shape.kernel_size, element_bytes, cluster);
      const bool can_spread =
          2 * cluster * geometry.samples <= kMultiprocessors && 2 * cluster * kFewestSlices <= geometry.size[0];
      if (plan.neighbours(most_bytes) >= 2 && !can_spread) break;
    }
    return plan.is_worthwhile(geometry.samples, sample_bytes, plan.neighbours(most_bytes)) ? plan : Residence{};
  }

 private:
  static constexpr int kMultiprocessors = 132;

  // Blocks that a multiprocessor has room for, which has most_bytes and kReservedBytes more, and 64 registers a thread.
  int64_t neighbours(int64_t most_bytes) const {
    constexpr int64_t kReservedBytes = 1 << 10, kMostThreads = 1024;
    return std::min((most_bytes + kReservedBytes) / (bytes + kReservedBytes), kMostThreads / threads);
  }

  // A block spends some microseconds in latencies and over its maps, of which a small map of many channels has much to
  // compute and little x to move. Then the three launches are quicker, unless all blocks run at once. Reckoned, not
  // measured.
  bool is_worthwhile(int64_t samples, int64_t sample_bytes, int64_t neighbours) const {
    constexpr int64_t kFewestBytes = 48 << 10;  // of x in a multiprocessor
    return neighbours > 0 &&
           (samples * cluster <= kMultiprocessors * neighbours || sample_bytes / cluster * neighbours >= kFewestBytes);
  }

  static Residence cut(const TripletGeometry& geometry, int kernel_size, int64_t element_bytes, int cluster) {
    Residence plan{};
    for (int a = 0; a < 3; ++a) plan.size[a] = static_cast<int>(geometry.size[a]);
    plan.cluster = cluster;
    plan.kernel_size = kernel_size;
    for (int a = 0; a < 3; ++a) plan.tile[a] = ceil_div(plan.outer(a), cluster);
    const int64_t slice_numel = geometry.size[1] * geometry.size[2];
    const int64_t tile_bytes = plan.tile[1] * slice_numel * element_bytes;
    constexpr int64_t kThreadBytes = 4 * kVectorBytes, kFewestThreads = 128;
    const int64_t threads = ceil_div(tile_bytes, kThreadBytes * kWarpThreads) * kWarpThreads;
    plan.threads = static_cast<int>(std::clamp<int64_t>(threads, kFewestThreads, kResidentThreads));

    const auto take = [&](int64_t bytes) {
      const int64_t begin = plan.bytes;
      plan.bytes += ceil_div<int64_t>(bytes, kVectorBytes) * kVectorBytes;
      return static_cast<int>(begin / static_cast<int64_t>(sizeof(float)));
    };
    constexpr int64_t kPair = 2 * sizeof(float);
    take(tile_bytes);
    plan.weights = take(3 * kPair * kernel_size * kernel_size);
    if (geometry.axis[0].branch >= 0) plan.partial = take(kPair * slice_numel);
    for (int a = 0; a < 3; ++a) {
      if (geometry.axis[a].branch >= 0) plan.plane[a] = take(kPair * plan.area(a));
      plan.gate[a] = take(static_cast<int64_t>(sizeof(float)) * plan.inner(a) * (a == 0 ? plan.size[1] : plan.tile[a]));
    }
    return plan;
  }
};

// The block's part.
template <typename T>
struct ResidentBlock {
  const Residence& plan;
  int rank;
  int first[3];  // of its rows of each map
  int count[3];
  T* tile;

  explicit __device__ __forceinline__ ResidentBlock(const Residence& plan)
      : plan(plan), rank(static_cast<int>(blockIdx.x) % plan.cluster), tile(dynamic_shared<T>()) {
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      first[a] = rank * plan.tile[a];
      count[a] = max(0, min(plan.tile[a], plan.outer(a) - first[a]));
    }
  }
  __device__ __forceinline__ int slices() const { return count[1]; }
  __device__ __forceinline__ int slice_numel() const { return plan.size[1] * plan.size[2]; }
  __device__ __forceinline__ int numel() const { return slices() * slice_numel(); }
  // Where x has its first element.
  __device__ __forceinline__ int64_t begin() const {
    const int64_t sample = blockIdx.x / static_cast<unsigned>(plan.cluster);
    return (sample * plan.size[0] + first[1]) * slice_numel();
  }
  __device__ __forceinline__ float* at(int floats) const { return dynamic_shared<float>() + floats; }
  __device__ __forceinline__ float* weights(int a) const {
    return at(plan.weights) + a * 2 * plan.kernel_size * plan.kernel_size;
  }
  // Of a value of the map, from the block's first row on, in the first channel of a plane.
  __device__ __forceinline__ int plane_at(int a, int row, int column) const {
    return (row + plan.border()) * plan.pitch(a) + column + plan.border();
  }
};

}  // namespace hashengine
