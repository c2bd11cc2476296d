// The passes of triplet attention that write a feature map, and the sums of its backward.
//
// y = x * (g0 + g1 + g2), each gate spread along the axis that it lacks: vectors of a row for the maps that pool A0 and
// A1, one value a row for the map that pools A2. Moved: x and y once; gates come from the cache.
// Backward first sums grad_y * x over each axis (grad_y and x once), then writes
//   grad_x = grad_y * (g0 + g1 + g2) + sum of even + (index == position ? peak : 0)    (grad_y and grad_x once)
// where `even` is the gradient of a mean, spread evenly, and `peak` that of a maximum, which goes to its index.
#pragma once

#include "triplet_pool.h"

namespace hashengine {

// One value for each place of the three maps: [A1][pitch], [A0][pitch], and by axis2_stride.
template <typename T>
struct OverAxes {
  T* axis[3];
};

template <typename Element, typename T>
HE_INLINE void gate_part(const Element* x, Element* y, const TripletLayout& layout, Range planes, OverAxes<T> gates) {
  const int64_t rows = layout.length[1], columns = layout.length[2], pitch = layout.pitch;
  const int64_t stride0 = layout.axis2_stride[0], stride1 = layout.axis2_stride[1];
  const T *const gate0 = gates.axis[0], *const gate1 = gates.axis[1], *const gate2 = gates.axis[2];
  for (int64_t a0 = planes.begin; a0 < planes.end; ++a0)
    for (int64_t a1 = 0; a1 < rows; ++a1) {
      const int64_t at = (a0 * rows + a1) * columns;
      const T of_row = gate2[a0 * stride0 + a1 * stride1];
      for_row(columns, rows - a1, [&](int64_t column, auto part) HE_INLINE_LAMBDA {
        const Lanes<T> gate = load(gate0 + a1 * pitch + column) + load(gate1 + a0 * pitch + column) + of_row;
        store(y + at + column, load(x + at + column, part) * gate, part);
      });
    }
}

// --- backward ---

// Running sums in memory, as in PoolRows.
template <typename T>
struct SumRows {
  T* sum;
  T* total;

  SumRows(Scratch& scratch, int64_t numel) : sum(scratch.take<T>(numel)), total(scratch.take<T>(numel)) {}
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

// Sums of grad_y * x over kPlanes planes from a0 on. sums.axis[1] and [2] get theirs, over0 a share.
template <int kPlanes, typename Element, typename T>
HE_INLINE void sum_planes(const Element* grad_y, const Element* x, const TripletLayout& layout, int64_t a0,
                          SumRows<T> over0, SumRows<T> over1, OverAxes<T> sums) {
  const int64_t rows = layout.length[1], columns = layout.length[2], pitch = layout.pitch;
  clear_sums(over1, kPlanes * pitch);
  for (int64_t a1 = 0; a1 < rows; ++a1) {
    Lanes<T> over2[kPlanes] = {};
    for_row(columns, rows - a1, [&](int64_t column, auto part) HE_INLINE_LAMBDA {
      Lanes<T> common = load(over0.sum + a1 * pitch + column);
#pragma GCC unroll 4
      for (int k = 0; k < kPlanes; ++k) {
        const int64_t at = ((a0 + k) * rows + a1) * columns + column;
        const Lanes<T> product = load(grad_y + at, part) * load(x + at, part);
        common += product;
        store(over1.sum + k * pitch + column, load(over1.sum + k * pitch + column) + product);
        over2[k] += keep<T>(product, Lanes<T>{}, part);
      }
      store(over0.sum + a1 * pitch + column, common);
    });
    if (sums.axis[2]) {
#pragma GCC unroll 4
      for (int k = 0; k < kPlanes; ++k)
        sums.axis[2][(a0 + k) * layout.axis2_stride[0] + a1 * layout.axis2_stride[1]] = sum_lanes(over2[k]);
    }
    if (a1 % kChain == kChain - 1) end_chain(over1.sum, over1.total, kPlanes * pitch);
  }
  for (int64_t i = 0; i < kPlanes * pitch; i += kLanes)
    store(sums.axis[1] + a0 * pitch + i, load(over1.total + i) + load(over1.sum + i));
}

template <typename Element, typename T>
HE_INLINE void sum_part(const Element* grad_y, const Element* x, const TripletLayout& layout, Range planes,
                        SumRows<T> over0, SumRows<T> over1, OverAxes<T> sums) {
  const int64_t numel = layout.plane_padded();
  clear_sums(over0, numel);
  int64_t chained = 0;
  int64_t a0 = planes.begin;
  for (; a0 + kPlanesAtOnce <= planes.end; a0 += kPlanesAtOnce) {
    sum_planes<kPlanesAtOnce>(grad_y, x, layout, a0, over0, over1, sums);
    if ((chained += kPlanesAtOnce) == kChain) {
      end_chain(over0.sum, over0.total, numel);
      chained = 0;
    }
  }
  if (a0 < planes.end) sum_planes<1>(grad_y, x, layout, a0, over0, over1, sums);
  end_chain(over0.sum, over0.total, numel);
}

// Adds the parts' shares of the sums over A0 up, in order, for the rows `rows` of A1, and writes them to the branch's
// padded map.
template <typename T>
HE_INLINE void finish_sums(const TripletLayout& layout, Range rows, SumRows<T> all, T* map, int64_t map_pitch) {
  const int64_t pitch = layout.pitch;
  for (int64_t at = rows.begin * pitch; at < rows.end * pitch; at += kLanes) {
    Lanes<T> total = load(all.total + at);
    for (int64_t part = 1; part < layout.parts; ++part) total += load(all.total + part * layout.plane_padded() + at);
    store((layout.axis0_is_turned ? all.sum : map) + at, total);
  }
  if (layout.axis0_is_turned)
    turn_rows(all.sum, pitch, rows.begin, rows.end, layout.length[2], map, map_pitch, map_pitch);
}

// What grad_x is made of.
template <typename T>
struct Routing {
  OverAxes<T> gate;
  OverAxes<T> even;
  OverAxes<T> peak;
  OverAxes<LaneIndex<T>> index;
};

template <int kPlanes, bool kGated, typename Element, typename T>
HE_INLINE void route_planes(const Element* grad_y, Element* grad_x, const TripletLayout& layout, int64_t a0,
                            const Routing<T>& from) {
  using Index = LaneMask<T>;
  const int64_t rows = layout.length[1], columns = layout.length[2], pitch = layout.pitch;
  const auto [gate, even, peak, index] = from;
  for (int64_t a1 = 0; a1 < rows; ++a1) {
    T gate2[kPlanes], even2[kPlanes], peak2[kPlanes];
    LaneIndex<T> index2[kPlanes];
#pragma GCC unroll 4
    for (int k = 0; k < kPlanes; ++k) {
      const int64_t at = (a0 + k) * layout.axis2_stride[0] + a1 * layout.axis2_stride[1];
      gate2[k] = kGated ? gate.axis[2][at] : T(0);
      even2[k] = even.axis[2][at];
      peak2[k] = peak.axis[2][at];
      index2[k] = index.axis[2][at];
    }
    for_row(columns, rows - a1, [&](int64_t column, auto part) HE_INLINE_LAMBDA {
      const int64_t common = a1 * pitch + column;
      const Lanes<T> gate0 = kGated ? load(gate.axis[0] + common) : Lanes<T>{};
      const Lanes<T> even0 = load(even.axis[0] + common);
      const Lanes<T> peak0 = load(peak.axis[0] + common);
      const Index index0 = load(index.axis[0] + common);
#pragma GCC unroll 4
      for (int k = 0; k < kPlanes; ++k) {
        const int64_t at = ((a0 + k) * rows + a1) * columns + column, own = (a0 + k) * pitch + column;
        Lanes<T> value = even0 + load(even.axis[1] + own) + even2[k];
        if constexpr (kGated) value += load(grad_y + at, part) * (gate0 + load(gate.axis[1] + own) + gate2[k]);
        const Lanes<T> zero = {};
        value += index0 == LaneIndex<T>(a0 + k) ? peak0 : zero;
        value += load(index.axis[1] + own) == LaneIndex<T>(a1) ? load(peak.axis[1] + own) : zero;
        value += lane_numbers<Index>() == LaneIndex<T>(index2[k] - column) ? broadcast(peak2[k]) : zero;
        store(grad_x + at, value, part);
      }
    });
  }
}

// Without gates there is no grad_y either: the gradient of the pooling alone.
template <bool kGated, typename Element, typename T>
HE_INLINE void route_part(const Element* grad_y, Element* grad_x, const TripletLayout& layout, Range planes,
                          const Routing<T>& from) {
  int64_t a0 = planes.begin;
  for (; a0 + kPlanesAtOnce <= planes.end; a0 += kPlanesAtOnce)
    route_planes<kPlanesAtOnce, kGated>(grad_y, grad_x, layout, a0, from);
  if (a0 < planes.end) route_planes<1, kGated>(grad_y, grad_x, layout, a0, from);
}

}  // namespace hashengine
