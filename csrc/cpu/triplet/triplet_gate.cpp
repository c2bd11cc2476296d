// triplet_gate on the CPU, forward and backward: the gates of triplet attention alone, with the passes of gate.h.
//
// Memory traffic for N elements of s bytes. Forward: 2Ns (x, y). Backward: at most 4Ns (grad_y and x for the gradients
// of the maps, then grad_y and grad_x), and less if a sample's grad_y stays in the cache between the two passes. In
// addition, the forward reads 4 bytes per value of the maps, and the backward reads 4 and writes 4 (8 each with
// float64).

#include "hashengine/triplet_gate.h"

#include "cpu/triplet/maps.h"

namespace hashengine {
namespace {

// Writes the padded gates of a part of a sample, each divided by the number of branches.
template <typename T>
HE_INLINE void make_gates(const TripletLayout& layout, const void* const* maps, int64_t sample, int64_t part,
                          const PaddedMaps<T>& gates) {
  const T scale = T(1) / T(layout.branches);
  for (int b = 0; b < layout.branches; ++b) {
    const TripletMap map = layout.map[b];
    const Range rows = layout.share(map.rows, kLanes, part);
    T* const to = gates.branch(layout, b);
    pad_rows(static_cast<const T*>(maps[b]) + sample * map.numel(), map, rows, T(1), to);
    for (int64_t i = rows.begin * map.pitch(); i < rows.end * map.pitch(); i += kLanes)
      store(to + i, sigmoid_lanes<Lanes<T>>(load(to + i)) * scale);
  }
  gates.finish(layout, part);
}

template <typename Element>
void forward(const TripletGateForward& p, SimdLevel level, const ThreadPool& pool) {
  using T = typename Arithmetic<Element>::Type;
  const TripletLayout layout(p.shape);
  const auto gates_in = [&](ScratchArena& scratch) { return PaddedMaps<T>(layout, scratch); };
  const auto gating = [&](int64_t sample, int64_t part, std::byte* memory) {
    ScratchArena scratch(memory);
    const PaddedMaps<T> gates = gates_in(scratch);
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA { make_gates(layout, p.map, sample, part, gates); });
  };
  const auto applying = [&](int64_t sample, int64_t part, std::byte* memory) {
    ScratchArena scratch(memory);
    const PaddedMaps<T> gates = gates_in(scratch);
    const int64_t at = sample * layout.sample_numel();
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA {
      gate_part(static_cast<const Element*>(p.x) + at, static_cast<Element*>(p.y) + at, layout,
                layout.share(layout.length[0], 1, part), gates.pointers(layout));
    });
  };
  ScratchArena measured;
  gates_in(measured);
  run_phases(pool, layout, measured.used(), false, gating, applying);
}

template <typename Element>
void backward(const TripletGateBackward& p, SimdLevel level, const ThreadPool& pool) {
  using T = typename Arithmetic<Element>::Type;
  const TripletLayout layout(p.shape);
  struct Buffers {
    SumRows<T> over0, over1;
    PaddedMaps<T> gates;
    T* sums;  // padded maps of the sums of grad_y * x
    int64_t bytes;
    Buffers(const TripletLayout& layout, ScratchArena scratch)
        : over0(scratch, layout.parts * layout.plane_padded()),
          over1(scratch, layout.parts * kPlanesAtOnce * layout.pitch),
          gates(layout, scratch),
          sums(scratch.take<T>(layout.padded_numel)),
          bytes(scratch.used()) {}
    T* sum(const TripletLayout& layout, int axis) const {
      return layout.has(axis) ? sums + layout.map_of(axis).padded_offset : nullptr;
    }
  };
  const auto grad_y = [&](int64_t sample) {
    return static_cast<const Element*>(p.grad_y) + sample * layout.sample_numel();
  };
  const auto summing = [&](int64_t sample, int64_t part, std::byte* memory) {
    const Buffers to(layout, ScratchArena(memory));
    const Element* const x = static_cast<const Element*>(p.x) + sample * layout.sample_numel();
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA {
      sum_part(grad_y(sample), x, layout, layout.share(layout.length[0], 1, part),
               to.over0.from(part * layout.plane_padded()), to.over1.from(part * kPlanesAtOnce * layout.pitch),
               MapPointers<T>{{nullptr, to.sum(layout, 1), to.sum(layout, 2)}});
      make_gates(layout, p.map, sample, part, to.gates);
    });
  };
  const auto merging = [&](int64_t, int64_t part, std::byte* memory) {
    const Buffers to(layout, ScratchArena(memory));
    if (!layout.has(0)) return;
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA {
      finish_sums(layout, layout.share(layout.length[1], kLanes, part), to.over0, to.sum(layout, 0),
                  layout.map_of(0).pitch());
    });
  };
  const auto writing = [&](int64_t sample, int64_t part, std::byte* memory) {
    const Buffers from(layout, ScratchArena(memory));
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA {
      for (int b = 0; b < layout.branches; ++b) {
        const TripletMap map = layout.map[b];
        const Range rows = layout.share(map.rows, kLanes, part);
        const T* const sums = from.sums + map.padded_offset;
        const T* const gates = from.gates.branch(layout, b);
        T* const to = static_cast<T*>(p.grad_map[b]) + sample * map.numel();
        const T branches = T(layout.branches);
        for (int64_t row = rows.begin; row < rows.end; ++row)
          for_row(map.columns, rows.end - row, [&](int64_t column, auto extent) HE_INLINE_LAMBDA {
            const int64_t at = row * map.pitch() + column;
            const Lanes<T> scaled_gate = load(gates + at);  // gate / branches
            store(to + row * map.columns + column, load(sums + at) * scaled_gate * (1 - scaled_gate * branches),
                  extent);
          });
      }
      Element* const grad_x = static_cast<Element*>(p.grad_x) + sample * layout.sample_numel();
      gate_part(grad_y(sample), grad_x, layout, layout.share(layout.length[0], 1, part), from.gates.pointers(layout));
    });
  };
  run_phases(pool, layout, Buffers(layout, ScratchArena()).bytes, false, summing, merging, writing);
}

}  // namespace

void triplet_gate_forward_cpu(const TripletGateForward& p, SimdLevel level, const ThreadPool& pool) {
  return with_element(p.shape.dtype, [&](auto element) { return forward<decltype(element)>(p, level, pool); });
}

void triplet_gate_backward_cpu(const TripletGateBackward& p, SimdLevel level, const ThreadPool& pool) {
  return with_element(p.shape.dtype, [&](auto element) { return backward<decltype(element)>(p, level, pool); });
}

}  // namespace hashengine
