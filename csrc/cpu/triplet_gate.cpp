// triplet_gate on the CPU, forward and backward: triplet attention's gates alone, on the same passes.
//
// Forward moves x and y once (2 numel s); backward grad_y and x once for the gradients of the maps, then grad_y and
// grad_x (4 numel s): a sample's second pass finds grad_y in the cache. Maps come on top, 4 bytes a value and pass.

#include "hashengine/triplet_gate.h"

#include "triplet_maps.h"

namespace hashengine {
namespace {

// A sample's gates over the number of branches, padded.
template <typename T>
HE_INLINE void make_gates(const TripletLayout& layout, const void* const* maps, int64_t sample, int64_t part,
                          const AxisMaps<T>& gates) {
  const T scale = T(1) / T(layout.branches);
  for (int b = 0; b < layout.branches; ++b) {
    const TripletMap map = layout.map[b];
    const Range rows = layout.share(map.rows, kLanes, part);
    T* const to = gates.branch(layout, b);
    pad_rows(static_cast<const T*>(maps[b]) + sample * map.numel(), map, rows, T(1), to);
    for (int64_t i = rows.begin * map.pitch(); i < rows.end * map.pitch(); i += kLanes)
      store(to + i, sigmoid_lanes<Lanes<T>>(load(to + i)) * scale);
  }
  gates.spread(layout, part);
}

template <typename Element>
void forward(const TripletGateForward& p, SimdLevel level, const ThreadPool& pool) {
  using T = typename Arithmetic<Element>::Type;
  const TripletLayout layout(p.shape);
  const auto gates_in = [&](Scratch& scratch) { return AxisMaps<T>(layout, scratch); };
  const auto gating = [&](int64_t sample, int64_t part, std::byte* memory) {
    Scratch scratch(memory);
    const AxisMaps<T> gates = gates_in(scratch);
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA { make_gates(layout, p.map, sample, part, gates); });
  };
  const auto applying = [&](int64_t sample, int64_t part, std::byte* memory) {
    Scratch scratch(memory);
    const AxisMaps<T> gates = gates_in(scratch);
    const int64_t at = sample * layout.sample_numel();
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA {
      gate_part(static_cast<const Element*>(p.x) + at, static_cast<Element*>(p.y) + at, layout,
                layout.share(layout.length[0], 1, part), gates.over_axes(layout));
    });
  };
  Scratch counted;
  gates_in(counted);
  run_phases(pool, layout, counted.used(), false, gating, applying);
}

template <typename Element>
void backward(const TripletGateBackward& p, SimdLevel level, const ThreadPool& pool) {
  using T = typename Arithmetic<Element>::Type;
  const TripletLayout layout(p.shape);
  struct Buffers {
    SumRows<T> over0, over1;
    AxisMaps<T> gates;
    T* sums;  // of grad_y * x, padded
    int64_t bytes;
    Buffers(const TripletLayout& layout, Scratch scratch)
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
    const Buffers to(layout, Scratch(memory));
    const Element* const x = static_cast<const Element*>(p.x) + sample * layout.sample_numel();
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA {
      sum_part(grad_y(sample), x, layout, layout.share(layout.length[0], 1, part),
               to.over0.from(part * layout.plane_padded()), to.over1.from(part * kPlanesAtOnce * layout.pitch),
               OverAxes<T>{{nullptr, to.sum(layout, 1), to.sum(layout, 2)}});
      make_gates(layout, p.map, sample, part, to.gates);
    });
  };
  const auto merging = [&](int64_t, int64_t part, std::byte* memory) {
    const Buffers to(layout, Scratch(memory));
    if (!layout.has(0)) return;
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA {
      finish_sums(layout, layout.share(layout.length[1], kLanes, part), to.over0, to.sum(layout, 0),
                  layout.map_of(0).pitch());
    });
  };
  const auto writing = [&](int64_t sample, int64_t part, std::byte* memory) {
    const Buffers from(layout, Scratch(memory));
    run_at_level<T>(level, [&]() HE_INLINE_LAMBDA {
      for (int b = 0; b < layout.branches; ++b) {
        const TripletMap map = layout.map[b];
        const Range rows = layout.share(map.rows, kLanes, part);
        const T* const sums = from.sums + map.padded_offset;
        const T* const gates = from.gates.branch(layout, b);
        T* const to = static_cast<T*>(p.grad_map[b]) + sample * map.numel();
        const T branches = T(layout.branches);
        for (int64_t row = rows.begin; row < rows.end; ++row)
          for_row(map.columns, rows.end - row, [&](int64_t column, auto part_of_row) HE_INLINE_LAMBDA {
            const int64_t at = row * map.pitch() + column;
            const Lanes<T> share = load(gates + at);  // of the mean: gate / branches
            store(to + row * map.columns + column, load(sums + at) * share * (1 - share * branches), part_of_row);
          });
      }
      Element* const grad_x = static_cast<Element*>(p.grad_x) + sample * layout.sample_numel();
      gate_part(grad_y(sample), grad_x, layout, layout.share(layout.length[0], 1, part), from.gates.over_axes(layout));
    });
  };
  run_phases(pool, layout, Buffers(layout, Scratch()).bytes, false, summing, merging, writing);
}

}  // namespace

void triplet_gate_forward_cpu(const TripletGateForward& p, SimdLevel level, const ThreadPool& pool) {
  return with_element(p.shape.dtype, [&](auto element) { return forward<decltype(element)>(p, level, pool); });
}

void triplet_gate_backward_cpu(const TripletGateBackward& p, SimdLevel level, const ThreadPool& pool) {
  return with_element(p.shape.dtype, [&](auto element) { return backward<decltype(element)>(p, level, pool); });
}

}  // namespace hashengine
