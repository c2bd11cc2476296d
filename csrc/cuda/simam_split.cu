// SimAM where a slab (simam_launch.h) is too large for the chip: statistics first, then the gate, each over all parts.
//
// Idea. Each block takes what it can hold of a slab and leaves two sums for each channel: forward the mean and the sum
// of squares around it, backward sum(s) and sum(s d). A small kernel merges those of a slab, in a fixed order and in
// float64, means and squares after Chan, Golub and LeVeque (1979): no difference of large sums. Then every part is read
// again.
//
// Traffic, N elements of s bytes. Forward: reads x, reads x, writes y: 3Ns. Backward: reads x and grad_y twice, writes
// grad_x: 5Ns. The second pass goes backwards through memory and finds in the L2 what the first read last. The floors,
// 2Ns and 3Ns, want a slab on chip: simam_on_chip.cu says how large it may be. The sums add
// 8 bytes to 32 KB.
//
// Launch. Three kernels: first and last 512 threads a block with 64 bytes each, as in simam_on_chip.cu; the merge has a
// warp a channel.
//
// Limits. 2^31 blocks of 32 KB.
#include "simam_slab.cuh"

namespace hashengine {
namespace {

constexpr int kMergeWarps = 8;  // a block

// In the workspace: [slab, part, channel of the slab, 2].
template <typename Held>
__device__ __forceinline__ void store_partials(const SimamSlabs& slabs, const SlabPlace<Held>& place, void* partials,
                                               const typename Held::Real (&pairs)[2 * Held::kChannels]) {
  if (!place.leads) return;
  const int64_t part = static_cast<int64_t>(place.slab) * slabs.parts + place.part;
  const int column = threadIdx.x;  // only the threads of the first row lead
  Held::store_pairs(partials, part * slabs.slab_channels + column * Held::kChannels, pairs);
}

template <typename Held>
__global__ void HE_SLAB_BOUNDS(Held)
    statistics_kernel(SimamForward params, SimamSlabs slabs, void* partials, int moment_values) {
  using Real = typename Held::Real;
  const SlabPlace<Held> place(slabs, blockIdx.x);
  Real* scratch = dynamic_shared<Real>();
  typename Held::Vectors x;
  Held::load(params.x, place, x);

  const Real inverse_count = Real(1) / static_cast<Real>(place.rows * (Held::kWidth / Held::kChannels));
  Real means[Held::kChannels] = {}, moments[Held::kMoments] = {}, pairs[2 * Held::kChannels];
  Held::sum(x, place, means);
  slab_sums<Held::kLayout>(slabs, scratch + moment_values, means);
#pragma unroll
  for (int c = 0; c < Held::kChannels; ++c) means[c] *= inverse_count;
  Held::sum_moments(x, place, means, moments);
  slab_sums<Held::kLayout>(slabs, scratch, moments);
  Held::correct(means, moments, inverse_count, pairs);
  store_partials(slabs, place, partials, pairs);
}

template <typename Held>
__global__ void HE_SLAB_BOUNDS(Held)
    gate_kernel(SimamForward params, SimamSlabs slabs, SimamTerms<typename Held::Real> terms) {
  const SlabPlace<Held> place(slabs, gridDim.x - 1 - blockIdx.x);
  typename Held::Vectors x;
  Held::load(params.x, place, x);
  typename Held::Plane planes[Held::kChannels];
  Held::load_planes(params.stats, place.channel, terms.lam, planes);
  Held::store_gated(x, place, planes, params.y);
}

template <typename Held>
__global__ void HE_SLAB_BOUNDS(Held)
    slopes_kernel(SimamBackward params, SimamSlabs slabs, SimamTerms<typename Held::Real> terms, void* partials) {
  using Real = typename Held::Real;
  constexpr int kChannels = Held::kChannels;
  const SlabPlace<Held> place(slabs, blockIdx.x);
  typename Held::Vectors x, grad_y;
  Held::load(params.x, place, x);
  Held::load(params.grad_y, place, grad_y);
  typename Held::Plane planes[kChannels];
  Held::load_planes(params.stats, place.channel, terms.lam, planes);

  Real sums[2 * kChannels] = {};
  typename Held::Reals t;  // not needed here
  Held::sum_slopes(x, grad_y, place, planes, sums, t);
  slab_sums<Held::kLayout>(slabs, dynamic_shared<Real>(), sums);
  store_partials(slabs, place, partials, sums);
}

template <typename Held>
__global__ void HE_SLAB_BOUNDS(Held)
    gradient_kernel(SimamBackward params, SimamSlabs slabs, SimamTerms<typename Held::Real> terms, const void* sums) {
  const SlabPlace<Held> place(slabs, gridDim.x - 1 - blockIdx.x);
  typename Held::Vectors x, grad_y;
  Held::load(params.x, place, x);
  Held::load(params.grad_y, place, grad_y);
  typename Held::Plane planes[Held::kChannels];
  Held::load_planes(params.stats, place.channel, terms.lam, planes);
  typename Held::Real of_slopes[2 * Held::kChannels];
  Held::load_pairs(sums, place.channel, of_slopes);
  Held::store_gradient_anew(x, grad_y, place, planes, of_slopes, terms, params.grad_x);
}

// Count, mean and sum of squares around the mean of a set of numbers.
struct Moments {
  double count, mean, squares;

  __device__ __forceinline__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count;
    const double delta = other.mean - mean;
    squares += other.squares + delta * delta * (count * other.count / total);
    mean += delta * (other.count / total);
    count = total;
  }
};

// A warp merges what the parts of a slab have to say about one channel.
template <typename Real, bool kIsForward>
__global__ void __launch_bounds__(kMergeWarps* kWarpThreads)
    merge_kernel(SimamSlabs slabs, int64_t row_positions, const void* partials, void* merged) {
  const int slab_channels = slabs.slab_channels;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / kWarpThreads;
  const int64_t slab = index / slab_channels;
  const int channel_in_slab = static_cast<int>(index - slab * slab_channels);
  if (slab >= slabs.count) return;  // a whole warp
  const int64_t sample = slab / slabs.per_sample;
  const int64_t channel = (slab - sample * slabs.per_sample) * slab_channels + channel_in_slab;
  if (channel >= slabs.channels) return;

  const unsigned lane = threadIdx.x % kWarpThreads;
  Moments all = {};
  double first = 0, second = 0;
  for (unsigned part = lane; part < slabs.parts; part += kWarpThreads) {
    const int64_t at = (slab * slabs.parts + part) * slab_channels + channel_in_slab;
    const auto& pair = vector_at<2>(static_cast<const Real*>(partials), 2 * at);
    if constexpr (kIsForward) {
      const int64_t rows_left = slabs.rows - static_cast<int64_t>(part) * slabs.part_rows;
      const int64_t rows = rows_left < slabs.part_rows ? rows_left : slabs.part_rows;
      all.merge({static_cast<double>(rows * row_positions), pair.at[0], pair.at[1]});
    } else {
      first += pair.at[0];
      second += pair.at[1];
    }
  }
  if constexpr (kIsForward) {
#pragma unroll
    for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
      all.merge({__shfl_down_sync(kWholeWarp, all.count, distance), __shfl_down_sync(kWholeWarp, all.mean, distance),
                 __shfl_down_sync(kWholeWarp, all.squares, distance)});
    }
    first = all.mean;
    second = all.squares / (all.count > 1 ? all.count - 1 : 1);
  } else {
    first = warp_sum(first);
    second = warp_sum(second);
  }
  if (lane == 0)
    vector_at<2>(static_cast<Real*>(merged), 2 * (sample * slabs.channels + channel)) = {static_cast<Real>(first),
                                                                                         static_cast<Real>(second)};
}

template <typename Held, bool kIsForward>
void launch_merge(const SimamSlabs& slabs, const void* partials, void* merged, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(slabs.count * slabs.slab_channels, kMergeWarps);
  launch(merge_kernel<typename Held::Real, kIsForward>, blocks, kMergeWarps * kWarpThreads, stream, slabs,
         int64_t{Held::kWidth / Held::kChannels}, partials, merged);
}

int64_t partials_bytes(const SimamSlabs& slabs, int64_t real_bytes) {
  return slabs.blocks() * slabs.slab_channels * 2 * real_bytes;
}

}  // namespace

int64_t simam_split_workspace_bytes(const SimamSlabs& slabs, const SimamShape& shape) {
  const int64_t real_bytes = shape.dtype == Dtype::kFloat64 ? sizeof(double) : sizeof(float);
  return partials_bytes(slabs, real_bytes) + shape.samples * shape.channels * 2 * real_bytes;
}

void launch_simam_split_forward(const SimamForward& params, const SimamSlabs& slabs, void* workspace,
                                cudaStream_t stream) {
  with_held(params.shape, slabs.width, [&](auto held) {
    using Held = decltype(held);
    using Real = typename Held::Real;
    const int64_t sum_values = slab_scratch_values(slabs, Held::kChannels, 1);
    const int64_t moment_values = slab_scratch_values(slabs, Held::kMoments, 1);
    const LaunchShape shape = {slabs.blocks(), slabs.threads,
                               (sum_values + moment_values) * static_cast<int64_t>(sizeof(Real))};
    launch(statistics_kernel<Held>, shape, stream, params, slabs, workspace, static_cast<int>(moment_values));
    launch_merge<Held, true>(slabs, workspace, params.stats, stream);
    launch(gate_kernel<Held>, slabs.blocks(), slabs.threads, stream, params, slabs,
           SimamTerms<Real>(params.shape, params.lam));
  });
}

void launch_simam_split_backward(const SimamBackward& params, const SimamSlabs& slabs, void* workspace,
                                 cudaStream_t stream) {
  with_held(params.shape, slabs.width, [&](auto held) {
    using Held = decltype(held);
    using Real = typename Held::Real;
    const SimamTerms<Real> terms(params.shape, params.lam);
    const int64_t scratch_bytes = slab_scratch_values(slabs, 2 * Held::kChannels, 1) * sizeof(Real);
    void* sums = static_cast<char*>(workspace) + partials_bytes(slabs, sizeof(Real));
    launch(slopes_kernel<Held>, {slabs.blocks(), slabs.threads, scratch_bytes}, stream, params, slabs, terms,
           workspace);
    launch_merge<Held, false>(slabs, workspace, sums, stream);
    launch(gradient_kernel<Held>, slabs.blocks(), slabs.threads, stream, params, slabs, terms,
           static_cast<const void*>(sums));
  });
}

}  // namespace hashengine
