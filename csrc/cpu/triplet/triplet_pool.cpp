// triplet_pool on the CPU, forward and backward: the pooling of triplet attention alone. The forward uses the passes of
// pool.h; the backward uses write_gradient() of gate.h.
//
// Memory traffic for N elements of s bytes: Ns (x in the forward, grad_x in the backward), and 12 bytes per value of
// the maps (20 with float64).

#include "hashengine/triplet_pool.h"

#include "cpu/triplet/maps.h"

namespace hashengine {
namespace {

template <typename Element>
void forward(const TripletPoolForward& p, SimdLevel level, const ThreadPool& pool) {
  using T = typename Arithmetic<Element>::Type;
  const TripletLayout layout(p.shape);
  struct Buffers {
    PoolRows<T> over0, over1;
    int64_t bytes;
    Buffers(const TripletLayout& layout, ScratchArena scratch)
        : over0(scratch, layout.parts * layout.plane_padded()),
          over1(scratch, layout.parts * kPlanesAtOnce * layout.pitch),
          bytes(scratch.used()) {}
  };
  const auto target = [&](int64_t sample, int axis) {
    SampleMaps<T> maps;
    for (int b = 0; b < layout.branches; ++b) {
      const int64_t at = sample * layout.map[b].numel();
      maps.branch[b] = {static_cast<T*>(p.pool[b]) + 2 * at, p.index[b] + at, nullptr};
    }
    return pool_target(layout, maps, axis);
  };
  const auto x = [&](int64_t sample) { return static_cast<const Element*>(p.x) + sample * layout.sample_numel(); };
  const auto pooling = [&](int64_t sample, int64_t part, std::byte* memory) {
    const Buffers buffers(layout, ScratchArena(memory));
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA {
      pool_part(x(sample), layout, layout.share(layout.length[0], 1, part),
                buffers.over0.from(part * layout.plane_padded()),
                buffers.over1.from(part * kPlanesAtOnce * layout.pitch), target(sample, 1), target(sample, 2));
    });
  };
  const auto merging = [&](int64_t sample, int64_t part, std::byte* memory) {
    const Buffers buffers(layout, ScratchArena(memory));
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA {
      finish_axis0(x(sample), layout, layout.share(layout.length[1], kLanes, part), buffers.over0, target(sample, 0));
    });
  };
  run_phases(pool, layout, Buffers(layout, ScratchArena()).bytes, false, pooling, merging);
}

template <typename Element>
void backward(const TripletPoolBackward& p, SimdLevel level, const ThreadPool& pool) {
  using T = typename Arithmetic<Element>::Type;
  const TripletLayout layout(p.shape);
  struct Buffers {
    PaddedMaps<T> mean_grad, max_grad;
    PaddedMaps<LaneIndex<T>> max_index;
    int64_t bytes;
    Buffers(const TripletLayout& layout, ScratchArena scratch)
        : mean_grad(layout, scratch), max_grad(layout, scratch), max_index(layout, scratch), bytes(scratch.used()) {}
  };
  const auto padding = [&](int64_t sample, int64_t part, std::byte* memory) {
    const Buffers to(layout, ScratchArena(memory));
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA {
      for (int b = 0; b < layout.branches; ++b) {
        const TripletMap map = layout.map[b];
        const Range rows = layout.share(map.rows, kLanes, part);
        const T* const grad_max = static_cast<const T*>(p.grad_pool[b]) + 2 * sample * map.numel();
        pad_rows(grad_max, map, rows, T(1), to.max_grad.branch(layout, b));
        pad_rows(grad_max + map.numel(), map, rows, T(1) / T(map.pooled_length), to.mean_grad.branch(layout, b));
        pad_index_rows<T>(p.index[b] + sample * map.numel(), map, rows, to.max_index.branch(layout, b));
      }
      to.mean_grad.finish(layout, part);
      to.max_grad.finish(layout, part);
      to.max_index.finish(layout, part);
    });
  };
  const auto writing = [&](int64_t sample, int64_t part, std::byte* memory) {
    const Buffers from(layout, ScratchArena(memory));
    Element* const grad_x = static_cast<Element*>(p.grad_x) + sample * layout.sample_numel();
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA {
      write_gradient<false, Element, T>(
          nullptr, grad_x, layout, layout.share(layout.length[0], 1, part),
          {{}, from.mean_grad.pointers(layout), from.max_grad.pointers(layout), from.max_index.pointers(layout)});
    });
  };
  run_phases(pool, layout, Buffers(layout, ScratchArena()).bytes, false, padding, writing);
}

}  // namespace

void triplet_pool_forward_cpu(const TripletPoolForward& p, SimdLevel level, const ThreadPool& pool) {
  return with_element(p.shape.dtype, [&](auto element) { return forward<decltype(element)>(p, level, pool); });
}

void triplet_pool_backward_cpu(const TripletPoolBackward& p, SimdLevel level, const ThreadPool& pool) {
  return with_element(p.shape.dtype, [&](auto element) { return backward<decltype(element)>(p, level, pool); });
}

}  // namespace hashengine
