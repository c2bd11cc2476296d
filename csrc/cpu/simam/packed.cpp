// simam on the CPU for rows shorter than a vector: contiguous planes of fewer than eight positions, and channels_last
// maps of fewer than eight channels.
//
// Idea. Planes are copied side by side into scratch memory, widened to the type of the arithmetic, and processed as a
// slab (slab.h).
//
// Memory traffic for N elements of s bytes: 2Ns forward and 3Ns backward (the floor) if a slab (64 small planes, or one
// sample) stays in the caches.

#include "cpu/simam/layouts.h"
#include "cpu/simam/slab.h"

namespace hashengine {
namespace {

constexpr int64_t kPlanes = 64;  // small contiguous planes per group

// Divides the planes into groups. A group is packed position by position: a row holds the values of the group's planes
// at one position, and is padded to whole vectors.
struct Groups {
  int64_t planes;  // in all samples
  int64_t positions;
  int64_t width;            // planes per group
  int64_t position_stride;  // strides are numbers of values of the feature map
  int64_t plane_stride;
  int64_t group_stride;

  explicit Groups(const SimamShape& shape) : planes(shape.samples * shape.channels), positions(shape.positions) {
    const bool contiguous = shape.layout == FeatureLayout::kContiguous;
    width = contiguous ? kPlanes : shape.channels;
    position_stride = contiguous ? 1 : shape.channels;
    plane_stride = contiguous ? positions : 1;
    group_stride = width * positions;
  }

  int64_t count() const { return ceil_div(planes, width); }
  int64_t grain() const { return ceil_div(kSimamGrain, width * positions); }
  HE_INLINE int64_t planes_in(int64_t group) const { return std::min(width, planes - group * width); }
  HE_INLINE Slab slab() const {
    const int64_t padded = ceil_div<int64_t>(width, kLanes) * kLanes;
    return {positions, padded, padded};
  }

  template <typename Element, typename T>
  HE_INLINE void pack(const void* map, int64_t group, std::vector<T>& packed) const {
    const Element* from = static_cast<const Element*>(map) + group * group_stride;
    const int64_t count = planes_in(group), stride = slab().stride;
    for (int64_t position = 0; position < positions; ++position) {
      T* row = packed.data() + position * stride;
      for (int64_t plane = 0; plane < count; ++plane)
        row[plane] = Arithmetic<Element>::load(from[position * position_stride + plane * plane_stride]);
    }
  }

  template <typename Element, typename T>
  HE_INLINE void unpack(const std::vector<T>& packed, int64_t group, void* map) const {
    Element* to = static_cast<Element*>(map) + group * group_stride;
    const int64_t count = planes_in(group), stride = slab().stride;
    for (int64_t position = 0; position < positions; ++position) {
      const T* row = packed.data() + position * stride;
      for (int64_t plane = 0; plane < count; ++plane)
        to[position * position_stride + plane * plane_stride] = Arithmetic<Element>::store(row[plane]);
    }
  }
};

template <typename Element>
struct Forward {
  using T = typename Arithmetic<Element>::Type;
  static HE_INLINE void run(const SimamForward& p, const Groups& groups, int64_t begin, int64_t end) {
    const Slab slab = groups.slab();
    std::vector<T> x(size_t(slab.positions * slab.width)), y(x.size()), stats(size_t(2 * slab.width));
    SimamSlabForward<T> forward(slab.vectors());
    for (int64_t group = begin; group < end; ++group) {
      groups.pack<Element>(p.x, group, x);
      forward.run(slab, x.data(), y.data(), stats.data(), p.lam);
      groups.unpack<Element>(y, group, p.y);
      std::copy_n(stats.data(), 2 * groups.planes_in(group), static_cast<T*>(p.stats) + 2 * group * groups.width);
    }
  }
};

template <typename Element>
struct Backward {
  using T = typename Arithmetic<Element>::Type;
  static HE_INLINE void run(const SimamBackward& p, const Groups& groups, int64_t begin, int64_t end) {
    const Slab slab = groups.slab();
    std::vector<T> x(size_t(slab.positions * slab.width)), grad_y(x.size()), grad_x(x.size());
    std::vector<T> stats(size_t(2 * slab.width));
    SimamSlabBackward<T> backward(slab.vectors(), slab.positions);
    for (int64_t group = begin; group < end; ++group) {
      groups.pack<Element>(p.x, group, x);
      groups.pack<Element>(p.grad_y, group, grad_y);
      std::copy_n(static_cast<const T*>(p.stats) + 2 * group * groups.width, 2 * groups.planes_in(group), stats.data());
      backward.run(slab, grad_y.data(), x.data(), stats.data(), grad_x.data(), p.lam);
      groups.unpack<Element>(grad_x, group, p.grad_x);
    }
  }
};

}  // namespace

template <typename Element>
void simam_forward_packed(const SimamForward& p, SimdLevel level, const ThreadPool& pool) {
  const Groups groups(p.shape);
  parallel_for(pool, groups.count(), groups.grain(),
               [&](int64_t begin, int64_t end) { run_at_level<Forward<Element>>(level, p, groups, begin, end); });
}

template <typename Element>
void simam_backward_packed(const SimamBackward& p, SimdLevel level, const ThreadPool& pool) {
  const Groups groups(p.shape);
  parallel_for(pool, groups.count(), groups.grain(),
               [&](int64_t begin, int64_t end) { run_at_level<Backward<Element>>(level, p, groups, begin, end); });
}

#define HE_INSTANTIATE(Element)                                                                   \
  template void simam_forward_packed<Element>(const SimamForward&, SimdLevel, const ThreadPool&); \
  template void simam_backward_packed<Element>(const SimamBackward&, SimdLevel, const ThreadPool&);
HE_INSTANTIATE(double)
HE_INSTANTIATE(float)
HE_INSTANTIATE(Float16)
HE_INSTANTIATE(BFloat16)

}  // namespace hashengine
