// simam on the CPU for channels_last maps with eight or more channels, in slabs of channels (slab.h).
//
// Idea. Slabs are as wide as the number of threads and kMaxWidth allow, because the hardware prefetches along a row,
// not down a column. In measurements, slabs of 32 channels were slower than whole rows, although such slabs stay in the
// second-level cache and whole rows must be read again from the third-level cache.
//
// Memory traffic for N elements of s bytes: 2Ns forward and 3Ns backward (the floor) if a slab stays in the caches,
// otherwise 3Ns and 5Ns.
//
// Each slab is computed by one thread. Results depend neither on the number of threads nor on the width of the slabs.

#include "cpu/simam/layouts.h"
#include "cpu/simam/slab.h"

namespace hashengine {
namespace {

constexpr int64_t kMinWidth = 32;   // channels: two cache lines of float32 per row
constexpr int64_t kMaxWidth = 512;  // channels, so that rows that are summed together stay in the second-level cache

// How samples are divided into slabs.
class Slabs {
 public:
  Slabs(const SimamShape& shape, int threads) : shape_(shape) {
    const int64_t share = shape.samples * shape.channels / threads;
    width_ = std::min(std::clamp(share / kMinWidth * kMinWidth, kMinWidth, kMaxWidth), shape.channels);
    per_sample_ = shape.channels / width_;
  }

  int64_t count() const { return shape_.samples * per_sample_; }
  int64_t grain() const { return ceil_div(kSimamGrain, width_ * shape_.positions); }
  // The last slab of a sample also takes the remaining channels, so it is the widest.
  Slab widest() const { return {shape_.positions, shape_.channels - (per_sample_ - 1) * width_, shape_.channels}; }

  HE_INLINE Slab slab(int64_t index) const {
    return is_last(index) ? widest() : Slab{shape_.positions, width_, shape_.channels};
  }
  // The offset of a slab's first value in the feature map.
  HE_INLINE int64_t offset(int64_t index) const {
    return index / per_sample_ * shape_.channels * shape_.positions + first_channel(index);
  }
  // The number of a slab's first plane, counted over all samples.
  HE_INLINE int64_t plane(int64_t index) const { return index / per_sample_ * shape_.channels + first_channel(index); }

 private:
  HE_INLINE int64_t first_channel(int64_t index) const { return index % per_sample_ * width_; }
  HE_INLINE bool is_last(int64_t index) const { return index % per_sample_ == per_sample_ - 1; }

  SimamShape shape_;
  int64_t width_;
  int64_t per_sample_;
};

template <typename Element>
struct Forward {
  using T = typename Arithmetic<Element>::Type;
  static HE_INLINE void run(const SimamForward& p, const Slabs& slabs, int64_t begin, int64_t end) {
    SimamSlabForward<Element> forward(slabs.widest().vectors());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = slabs.offset(i);
      forward.run(slabs.slab(i), static_cast<const Element*>(p.x) + offset, static_cast<Element*>(p.y) + offset,
                  static_cast<T*>(p.stats) + 2 * slabs.plane(i), p.lam);
    }
  }
};

template <typename Element>
struct Backward {
  using T = typename Arithmetic<Element>::Type;
  static HE_INLINE void run(const SimamBackward& p, const Slabs& slabs, int64_t begin, int64_t end) {
    SimamSlabBackward<Element> backward(slabs.widest().vectors(), p.shape.positions);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = slabs.offset(i);
      backward.run(slabs.slab(i), static_cast<const Element*>(p.grad_y) + offset,
                   static_cast<const Element*>(p.x) + offset, static_cast<const T*>(p.stats) + 2 * slabs.plane(i),
                   static_cast<Element*>(p.grad_x) + offset, p.lam);
    }
  }
};

}  // namespace

template <typename Element>
void simam_forward_channels_last(const SimamForward& p, SimdLevel level, const ThreadPool& pool) {
  const Slabs slabs(p.shape, pool.threads);
  parallel_for(pool, slabs.count(), slabs.grain(),
               [&](int64_t begin, int64_t end) { run_at_level<Forward<Element>>(level, p, slabs, begin, end); });
}

template <typename Element>
void simam_backward_channels_last(const SimamBackward& p, SimdLevel level, const ThreadPool& pool) {
  const Slabs slabs(p.shape, pool.threads);
  parallel_for(pool, slabs.count(), slabs.grain(),
               [&](int64_t begin, int64_t end) { run_at_level<Backward<Element>>(level, p, slabs, begin, end); });
}

#define HE_INSTANTIATE(Element)                                                                          \
  template void simam_forward_channels_last<Element>(const SimamForward&, SimdLevel, const ThreadPool&); \
  template void simam_backward_channels_last<Element>(const SimamBackward&, SimdLevel, const ThreadPool&);
HE_INSTANTIATE(double)
HE_INSTANTIATE(float)
HE_INSTANTIATE(Float16)
HE_INSTANTIATE(BFloat16)

}  // namespace hashengine
