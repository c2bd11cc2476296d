// Pooling of triplet attention: maximum, its index and mean over all three axes in one pass over x.
//
// Two planes of A0 are read at a time. Their common row of the map over A0 stays in registers for both, the maps over
// A1 stay in the first-level cache, those over A2 are folded in registers. Moved: x once, and 12 bytes a value of the
// maps (16 with float64). `value > maximum` in ascending order keeps the lowest index of equals and never takes a NaN;
// a NaN shows in the mean, and the few such maxima are looked up again. Sums are split after 64 additions and so stay
// as accurate as pairwise ones.
#pragma once

#include "triplet_layout.h"

namespace hashengine {

constexpr int64_t kChain = 64;  // additions
constexpr int64_t kPlanesAtOnce = 2;

// Running maximum, index and sum in memory. `sum` moves to `total` after every kChain additions.
template <typename T>
struct PoolRows {
  T* max;
  LaneIndex<T>* index;
  T* sum;
  T* total;

  PoolRows(Scratch& scratch, int64_t numel)
      : max(scratch.take<T>(numel)),
        index(scratch.take<LaneIndex<T>>(numel)),
        sum(scratch.take<T>(numel)),
        total(scratch.take<T>(numel)) {}
  PoolRows from(int64_t at) const {
    PoolRows rows = *this;
    rows.max += at;
    rows.index += at;
    rows.sum += at;
    rows.total += at;
    return rows;
  }
};

template <typename T>
struct Pooled {
  Lanes<T> max = broadcast(-std::numeric_limits<T>::infinity());
  LaneMask<T> index = {};
  Lanes<T> sum = {};
};

template <typename T>
HE_INLINE void include(Pooled<T>& pooled, Lanes<T> candidate, Lanes<T> addend, LaneIndex<T> position) {
  const LaneMask<T> is_above = candidate > pooled.max;
  pooled.max = is_above ? candidate : pooled.max;
  pooled.index = is_above ? LaneMask<T>{} + position : pooled.index;
  pooled.sum += addend;
}

template <typename T>
HE_INLINE Pooled<T> load_pooled(const PoolRows<T>& rows, int64_t at) {
  return {load(rows.max + at), load(rows.index + at), load(rows.sum + at)};
}
template <typename T>
HE_INLINE void store_pooled(const PoolRows<T>& rows, int64_t at, const Pooled<T>& pooled) {
  store(rows.max + at, pooled.max);
  store(rows.index + at, pooled.index);
  store(rows.sum + at, pooled.sum);
}

template <typename T>
HE_INLINE void clear_pool(const PoolRows<T>& rows, int64_t numel) {
  for (int64_t i = 0; i < numel; i += kLanes) {
    store_pooled(rows, i, Pooled<T>());
    store(rows.total + i, Lanes<T>{});
  }
}
template <typename T>
HE_INLINE void end_chain(T* sum, T* total, int64_t numel) {
  for (int64_t i = 0; i < numel; i += kLanes) {
    store(total + i, load(total + i) + load(sum + i));
    store(sum + i, Lanes<T>{});
  }
}

// Where a pooled axis' map goes: one sample's maximum, mean and index, [rows][columns] as the axes lie in x. A map that
// nobody wants is null.
template <typename T>
struct PoolTarget {
  T* max;
  T* mean;
  int32_t* index;
  int64_t row_stride;
  int64_t column_stride;
};

// The index of the first NaN of a line, or -1.
template <typename Element>
HE_INLINE int64_t find_nan(const Element* line, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto value = Arithmetic<Element>::load(line[i * stride]);
    if (value != value) return i;
  }
  return -1;
}

// Gives the maxima of a row their NaN where the mean is one: line(column) points to the first of what was pooled.
template <typename T, typename Line>
HE_INLINE void take_nan(T* max, LaneIndex<T>* index, const T* mean, int64_t columns, int64_t stride, int64_t count,
                        Line line) {
  for (int64_t column = 0; column < columns; column += kLanes) {
    const Lanes<T> means = load(mean + column);
    if (sum_lanes(means - means) == T(0)) continue;  // infinities are looked at, too, in vain
    for (int64_t i = column; i < std::min(column + kLanes, columns); ++i) {
      if (mean[i] == mean[i]) continue;
      const int64_t found = find_nan(line(i), stride, count);
      if (found < 0) continue;  // infinities of both signs
      max[i] = std::numeric_limits<T>::quiet_NaN();
      index[i] = LaneIndex<T>(found);
    }
  }
}

// Folds the lanes of a row and writes its one value of the map over A2.
template <typename Element, typename T>
HE_INLINE void finish_row(const Pooled<T>& pooled, const Element* row, int64_t length, const PoolTarget<T>& target,
                          int64_t at) {
  using Index = LaneMask<T>;
  const Lanes<T> max = fold_lanes(pooled.max, [](auto a, auto b) HE_INLINE_LAMBDA { return a > b ? a : b; });
  const Index position = pooled.index * kLanes + lane_numbers<Index>();
  const Index candidates = pooled.max == max ? position : Index{} + std::numeric_limits<int32_t>::max();
  const Index lowest = fold_lanes(candidates, [](auto a, auto b) HE_INLINE_LAMBDA { return a < b ? a : b; });
  const T mean = sum_lanes(pooled.sum) / T(length);
  T value = max[0];
  int32_t index = int32_t(lowest[0]);
  if (mean != mean) {
    const int64_t found = find_nan(row, 1, length);
    if (found >= 0) {
      value = std::numeric_limits<T>::quiet_NaN();
      index = int32_t(found);
    }
  }
  target.max[at] = value;
  target.mean[at] = mean;
  target.index[at] = index;
}

// kPlanes planes from a0 on: into `over0`, which they share, the map over A1 of each through `over1`, that over A2.
template <int kPlanes, typename Element, typename T>
HE_INLINE void pool_planes(const Element* x, const TripletLayout& layout, int64_t a0, PoolRows<T> over0,
                           PoolRows<T> over1, PoolTarget<T> target1, PoolTarget<T> target2) {
  const int64_t rows = layout.length[1], columns = layout.length[2], pitch = layout.pitch;
  const int64_t plane = rows * columns;
  const Element* const first = x + a0 * plane;
  const Lanes<T> nothing = broadcast(-std::numeric_limits<T>::infinity());
  clear_pool(over1, kPlanes * pitch);
  for (int64_t a1 = 0; a1 < rows; ++a1) {
    Pooled<T> over2[kPlanes];
    for_row(columns, rows - a1, [&](int64_t column, auto part) HE_INLINE_LAMBDA {
      Pooled<T> common = load_pooled(over0, a1 * pitch + column);
#pragma GCC unroll 4
      for (int k = 0; k < kPlanes; ++k) {
        const Lanes<T> value = load(first + k * plane + a1 * columns + column, part);
        include<T>(common, value, value, LaneIndex<T>(a0 + k));
        Pooled<T> own = load_pooled(over1, k * pitch + column);
        include<T>(own, value, value, LaneIndex<T>(a1));
        store_pooled(over1, k * pitch + column, own);
        include<T>(over2[k], keep<T>(value, nothing, part), keep<T>(value, Lanes<T>{}, part),
                   LaneIndex<T>(column / kLanes));
      }
      store_pooled(over0, a1 * pitch + column, common);
    });
    if (target2.max) {
#pragma GCC unroll 4
      for (int k = 0; k < kPlanes; ++k)
        finish_row(over2[k], first + k * plane + a1 * columns, columns, target2,
                   (a0 + k) * target2.row_stride + a1 * target2.column_stride);
    }
    if (a1 % kChain == kChain - 1) end_chain(over1.sum, over1.total, kPlanes * pitch);
  }
  end_chain(over1.sum, over1.total, kPlanes * pitch);
  if (!target1.max) return;
  for (int k = 0; k < kPlanes; ++k) {
    const int64_t at = k * pitch;
    for (int64_t i = at; i < at + pitch; i += kLanes) store(over1.sum + i, load(over1.total + i) / T(rows));
    take_nan(over1.max + at, over1.index + at, over1.sum + at, columns, columns, rows,
             [&](int64_t column) HE_INLINE_LAMBDA { return first + k * plane + column; });
    const int64_t to = (a0 + k) * target1.row_stride;
    copy_rows(over1.max + at, pitch, 1, columns, target1.max + to, 0);
    copy_rows(over1.sum + at, pitch, 1, columns, target1.mean + to, 0);
    copy_rows(over1.index + at, pitch, 1, columns, target1.index + to, 0);
  }
}

// The planes [begin, end) of a sample; `over0` gets their share of the map over A0.
template <typename Element, typename T>
HE_INLINE void pool_part(const Element* x, const TripletLayout& layout, Range planes, PoolRows<T> over0,
                         PoolRows<T> over1, PoolTarget<T> target1, PoolTarget<T> target2) {
  const int64_t numel = layout.plane_padded();
  clear_pool(over0, numel);
  int64_t chained = 0;
  int64_t a0 = planes.begin;
  for (; a0 + kPlanesAtOnce <= planes.end; a0 += kPlanesAtOnce) {
    pool_planes<kPlanesAtOnce>(x, layout, a0, over0, over1, target1, target2);
    if ((chained += kPlanesAtOnce) == kChain) {
      end_chain(over0.sum, over0.total, numel);
      chained = 0;
    }
  }
  if (a0 < planes.end) pool_planes<1>(x, layout, a0, over0, over1, target1, target2);
  end_chain(over0.sum, over0.total, numel);
}

// Puts the parts of the map over A0, which lie one after another, together in order, in the first, for the rows `rows`
// of A1; and writes them.
template <typename Element, typename T>
HE_INLINE void finish_axis0(const Element* x, const TripletLayout& layout, Range rows, PoolRows<T> all,
                            PoolTarget<T> target) {
  const int64_t columns = layout.length[2], pitch = layout.pitch, plane = layout.plane_numel();
  if (!target.max || rows.begin == rows.end) return;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t at = row * pitch; at < (row + 1) * pitch; at += kLanes) {
      Lanes<T> max = load(all.max + at), total = load(all.total + at);
      LaneMask<T> index = load(all.index + at);
      for (int64_t part = 1; part < layout.parts; ++part) {
        const int64_t there = part * layout.plane_padded() + at;
        const Lanes<T> other = load(all.max + there);
        const LaneMask<T> is_above = other > max;
        max = is_above ? other : max;
        index = is_above ? load(all.index + there) : index;
        total += load(all.total + there);
      }
      store(all.max + at, max);
      store(all.index + at, index);
      store(all.sum + at, total / T(layout.length[0]));
    }
    const int64_t at = row * pitch;
    take_nan(all.max + at, all.index + at, all.sum + at, columns, plane, layout.length[0],
             [&](int64_t column) HE_INLINE_LAMBDA { return x + row * columns + column; });
  }
  const auto write = [&](auto* from, auto* to) HE_INLINE_LAMBDA {
    if (layout.axis0_is_turned) {
      turn_rows(from, pitch, rows.begin, rows.end, columns, to, layout.length[1], rows.end);
    } else {
      copy_rows(from + rows.begin * pitch, pitch, rows.end - rows.begin, columns, to + rows.begin * columns, columns);
    }
  };
  write(all.max, target.max);
  write(all.sum, target.mean);
  write(all.index, target.index);
}

}  // namespace hashengine
