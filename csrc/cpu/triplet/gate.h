// The passes of triplet attention that apply the gates, and their backward. A0, A1 and A2 are the axes of x in memory
// order (layout.h).
//
// Forward: y = x * (g0 + g1 + g2), where each gate is broadcast along the axis that its branch pools. The gates over A0
// and A1 are vectors along a row; the gate over A2 is one value per row. Memory traffic: x is read and y is written
// once; the gates come from the cache.
//
// Backward: the first pass reads grad_y and x once and sums grad_y * x over each axis, which gives the gradients of the
// gates. The second pass reads grad_y and writes grad_x once:
//   grad_x = grad_y * (g0 + g1 + g2) + sum over the branches of (mean_grad + (max_index == position ? max_grad : 0))
// mean_grad is the gradient of a pooled mean, divided by the pooled length; max_grad is the gradient of a pooled
// maximum.
#pragma once

#include "cpu/triplet/pool.h"

namespace hashengine {

// The maps over A0, A1 and A2 of one sample. The first two are [A1][pitch] and [A0][pitch]; the third has the strides
// axis2_stride.
template <typename T>
struct MapPointers {
  T* axis[3];
};

template <typename Element, typename T>
HE_INLINE void gate_part(const Element* x, Element* y, const TripletLayout& layout, Range planes,
                         MapPointers<T> gates) {
  const int64_t rows = layout.length[1], columns = layout.length[2], pitch = layout.pitch;
  const int64_t stride0 = layout.axis2_stride[0], stride1 = layout.axis2_stride[1];
  const T *const gate0 = gates.axis[0], *const gate1 = gates.axis[1], *const gate2 = gates.axis[2];
  for (int64_t a0 = planes.begin; a0 < planes.end; ++a0)
    for (int64_t a1 = 0; a1 < rows; ++a1) {
      const int64_t at = (a0 * rows + a1) * columns;
      const T row_gate = gate2[a0 * stride0 + a1 * stride1];
      for_row(columns, rows - a1, [&](int64_t column, auto extent) HE_INLINE_LAMBDA {
        const Lanes<T> gate = load(gate0 + a1 * pitch + column) + load(gate1 + a0 * pitch + column) + row_gate;
        store(y + at + column, load(x + at + column, extent) * gate, extent);
      });
    }
}

// --- backward ---

// Running sums in memory. As in PoolRows (pool.h), `sum` is added to `total` after every kChainLength additions.
template <typename T>
struct SumRows {
  T* sum;
  T* total;

  SumRows(ScratchArena& scratch, int64_t numel) : sum(scratch.take<T>(numel)), total(scratch.take<T>(numel)) {}
  SumRows from(int64_t at) const {
    SumRows rows = *this;
    rows.sum += at;
    rows.total += at;
    return rows;
  }
};

template <typename T>
HE_INLINE void clear_sums(const SumRows<T>& rows, int64_t numel) {
  for (int64_t i = 0; i < numel; i += kLanes) {
    store(rows.sum + i, Lanes<T>{});
    store(rows.total + i, Lanes<T>{});
  }
}

// Sums grad_y * x for kPlanes planes, starting with plane a0. Updates over0, which holds the sums over A0. Writes the
// sums over A1 and A2 of these planes to sums.axis[1] and sums.axis[2]. over1 is scratch.
template <int kPlanes, typename Element, typename T>
HE_INLINE void sum_planes(const Element* grad_y, const Element* x, const TripletLayout& layout, int64_t a0,
                          SumRows<T> over0, SumRows<T> over1, MapPointers<T> sums) {
  const int64_t rows = layout.length[1], columns = layout.length[2], pitch = layout.pitch;
  clear_sums(over1, kPlanes * pitch);
  for (int64_t a1 = 0; a1 < rows; ++a1) {
    Lanes<T> over2[kPlanes] = {};
    for_row(columns, rows - a1, [&](int64_t column, auto extent) HE_INLINE_LAMBDA {
      Lanes<T> common = load(over0.sum + a1 * pitch + column);
#pragma GCC unroll 4
      for (int k = 0; k < kPlanes; ++k) {
        const int64_t at = ((a0 + k) * rows + a1) * columns + column;
        const Lanes<T> product = load(grad_y + at, extent) * load(x + at, extent);
        common += product;
        store(over1.sum + k * pitch + column, load(over1.sum + k * pitch + column) + product);
        over2[k] += keep_lanes<T>(product, Lanes<T>{}, extent);
      }
      store(over0.sum + a1 * pitch + column, common);
    });
    if (sums.axis[2]) {
#pragma GCC unroll 4
      for (int k = 0; k < kPlanes; ++k)
        sums.axis[2][(a0 + k) * layout.axis2_stride[0] + a1 * layout.axis2_stride[1]] = sum_lanes(over2[k]);
    }
    if (a1 % kChainLength == kChainLength - 1) end_chain(over1.sum, over1.total, kPlanes * pitch);
  }
  for (int64_t i = 0; i < kPlanes * pitch; i += kLanes)
    store(sums.axis[1] + a0 * pitch + i, load(over1.total + i) + load(over1.sum + i));
}

// Sums grad_y * x for the given planes of a sample. over0 receives these planes' part of the sums over A0.
template <typename Element, typename T>
HE_INLINE void sum_part(const Element* grad_y, const Element* x, const TripletLayout& layout, Range planes,
                        SumRows<T> over0, SumRows<T> over1, MapPointers<T> sums) {
  const int64_t numel = layout.plane_padded();
  clear_sums(over0, numel);
  int64_t chained = 0;
  int64_t a0 = planes.begin;
  for (; a0 + kPlanesAtOnce <= planes.end; a0 += kPlanesAtOnce) {
    sum_planes<kPlanesAtOnce>(grad_y, x, layout, a0, over0, over1, sums);
    if ((chained += kPlanesAtOnce) == kChainLength) {
      end_chain(over0.sum, over0.total, numel);
      chained = 0;
    }
  }
  if (a0 < planes.end) sum_planes<1>(grad_y, x, layout, a0, over0, over1, sums);
  end_chain(over0.sum, over0.total, numel);
}

// For rows `rows` of A1: adds up the parts' sums over A0, in order, and writes the totals to the branch's padded map.
template <typename T>
HE_INLINE void finish_sums(const TripletLayout& layout, Range rows, SumRows<T> all, T* map, int64_t map_pitch) {
  const int64_t pitch = layout.pitch;
  for (int64_t at = rows.begin * pitch; at < rows.end * pitch; at += kLanes) {
    Lanes<T> total = load(all.total + at);
    for (int64_t part = 1; part < layout.parts; ++part) total += load(all.total + part * layout.plane_padded() + at);
    store((layout.axis0_is_transposed ? all.sum : map) + at, total);
  }
  if (layout.axis0_is_transposed)
    transpose_rows(all.sum, pitch, rows.begin, rows.end, layout.length[2], map, map_pitch, map_pitch);
}

// The terms of grad_x.
template <typename T>
struct GradientTerms {
  MapPointers<T> gate;
  MapPointers<T> mean_grad;
  MapPointers<T> max_grad;
  MapPointers<LaneIndex<T>> max_index;
};

template <int kPlanes, bool kGated, typename Element, typename T>
HE_INLINE void write_gradient_of_planes(const Element* grad_y, Element* grad_x, const TripletLayout& layout, int64_t a0,
                                        const GradientTerms<T>& from) {
  using Index = LaneMask<T>;
  const int64_t rows = layout.length[1], columns = layout.length[2], pitch = layout.pitch;
  const auto [gate, mean_grad, max_grad, max_index] = from;
  for (int64_t a1 = 0; a1 < rows; ++a1) {
    T gate2[kPlanes], mean_grad2[kPlanes], max_grad2[kPlanes];
    LaneIndex<T> max_index2[kPlanes];
#pragma GCC unroll 4
    for (int k = 0; k < kPlanes; ++k) {
      const int64_t at = (a0 + k) * layout.axis2_stride[0] + a1 * layout.axis2_stride[1];
      gate2[k] = kGated ? gate.axis[2][at] : T(0);
      mean_grad2[k] = mean_grad.axis[2][at];
      max_grad2[k] = max_grad.axis[2][at];
      max_index2[k] = max_index.axis[2][at];
    }
    for_row(columns, rows - a1, [&](int64_t column, auto extent) HE_INLINE_LAMBDA {
      const int64_t common = a1 * pitch + column;
      const Lanes<T> gate0 = kGated ? load(gate.axis[0] + common) : Lanes<T>{};
      const Lanes<T> mean_grad0 = load(mean_grad.axis[0] + common);
      const Lanes<T> max_grad0 = load(max_grad.axis[0] + common);
      const Index max_index0 = load(max_index.axis[0] + common);
#pragma GCC unroll 4
      for (int k = 0; k < kPlanes; ++k) {
        const int64_t at = ((a0 + k) * rows + a1) * columns + column, own = (a0 + k) * pitch + column;
        Lanes<T> value = mean_grad0 + load(mean_grad.axis[1] + own) + mean_grad2[k];
        if constexpr (kGated) value += load(grad_y + at, extent) * (gate0 + load(gate.axis[1] + own) + gate2[k]);
        const Lanes<T> zero = {};
        value += max_index0 == LaneIndex<T>(a0 + k) ? max_grad0 : zero;
        value += load(max_index.axis[1] + own) == LaneIndex<T>(a1) ? load(max_grad.axis[1] + own) : zero;
        value += lane_numbers<Index>() == LaneIndex<T>(max_index2[k] - column) ? broadcast(max_grad2[k]) : zero;
        store(grad_x + at, value, extent);
      }
    });
  }
}

// Writes grad_x for the given planes of a sample. If kGated is false, grad_y and the gates are not used: this is the
// backward of the pooling alone.
template <bool kGated, typename Element, typename T>
HE_INLINE void write_gradient(const Element* grad_y, Element* grad_x, const TripletLayout& layout, Range planes,
                              const GradientTerms<T>& from) {
  int64_t a0 = planes.begin;
  for (; a0 + kPlanesAtOnce <= planes.end; a0 += kPlanesAtOnce)
    write_gradient_of_planes<kPlanesAtOnce, kGated>(grad_y, grad_x, layout, a0, from);
  if (a0 < planes.end) write_gradient_of_planes<1, kGated>(grad_y, grad_x, layout, a0, from);
}

}  // namespace hashengine
