// Pooling of triplet attention: the maximum, its index and the mean over each of the three axes, in one pass over x.
//
// Idea. A0, A1 and A2 are the axes of x in memory order (layout.h); a plane here is [A1, A2] at one index of A0. Two
// consecutive planes are read at a time. Each vector of the map over A0 is loaded and stored once for both planes, the
// maps over A1 stay in the first-level cache, and the maps over A2 are reduced in registers.
//
// Memory traffic. x is read once, and 12 bytes per value of the maps are written (20 with float64).
//
// Numerics. Values are compared by `value > maximum` in ascending order of their index, which keeps the lowest index
// among equal values and ignores NaN. A NaN makes the mean NaN, so a search for NaN follows only if the mean is NaN.
// Sums over A0 and A1 are split into chains of 64 additions, which makes them about as accurate as pairwise sums. A sum
// over A2 is split between eight lanes only.
#pragma once

#include "cpu/triplet/layout.h"

namespace hashengine {

constexpr int64_t kChainLength = 64;  // additions to a sum before the sum is added to its total
constexpr int64_t kPlanesAtOnce = 2;

// Running maximum, index and sum in memory. `sum` is added to `total` after every kChainLength additions.
template <typename T>
struct PoolRows {
  T* max;
  LaneIndex<T>* index;
  T* sum;
  T* total;

  PoolRows(ScratchArena& scratch, int64_t numel)
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
HE_INLINE void accumulate(Pooled<T>& pooled, Lanes<T> candidate, Lanes<T> addend, LaneIndex<T> position) {
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

// The destination of one sample's map over an axis: maximum, mean and index, with the strides of the two remaining axes
// in x's order. The pointers are null if the map is not needed.
template <typename T>
struct PoolTarget {
  T* max;
  T* mean;
  int32_t* index;
  int64_t row_stride;
  int64_t column_stride;
};

// The index of the first NaN among `count` values that are `stride` apart, or -1.
template <typename Element>
HE_INLINE int64_t find_nan(const Element* line, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto value = Arithmetic<Element>::load(line[i * stride]);
    if (value != value) return i;
  }
  return -1;
}

// For each column of a row: if a NaN was pooled, sets the maximum to NaN and the index to that of the first NaN.
// line(column) points to the first of the column's pooled values.
template <typename T, typename Line>
HE_INLINE void propagate_nan(T* max, LaneIndex<T>* index, const T* mean, int64_t columns, int64_t stride, int64_t count,
                             Line line) {
  for (int64_t column = 0; column < columns; column += kLanes) {
    const Lanes<T> means = load(mean + column);
    if (sum_lanes(means - means) == T(0)) continue;  // all finite; an infinite mean only costs a redundant check
    for (int64_t i = column; i < std::min(column + kLanes, columns); ++i) {
      if (mean[i] == mean[i]) continue;
      const int64_t found = find_nan(line(i), stride, count);
      if (found < 0) continue;  // the mean of infinities of both signs is NaN, too
      max[i] = std::numeric_limits<T>::quiet_NaN();
      index[i] = LaneIndex<T>(found);
    }
  }
}

// Reduces the lanes of a row and writes the row's maximum, mean and index to the map over A2.
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

// Pools kPlanes planes, starting with plane a0. Updates over0, which holds the map over A0. Writes the entries that
// these planes contribute to the map over A1 to target1, and those of the map over A2 to target2. over1 is scratch.
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
    for_row(columns, rows - a1, [&](int64_t column, auto extent) HE_INLINE_LAMBDA {
      Pooled<T> common = load_pooled(over0, a1 * pitch + column);
#pragma GCC unroll 4
      for (int k = 0; k < kPlanes; ++k) {
        const Lanes<T> value = load(first + k * plane + a1 * columns + column, extent);
        accumulate<T>(common, value, value, LaneIndex<T>(a0 + k));
        Pooled<T> own = load_pooled(over1, k * pitch + column);
        accumulate<T>(own, value, value, LaneIndex<T>(a1));
        store_pooled(over1, k * pitch + column, own);
        accumulate<T>(over2[k], keep_lanes<T>(value, nothing, extent), keep_lanes<T>(value, Lanes<T>{}, extent),
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
    if (a1 % kChainLength == kChainLength - 1) end_chain(over1.sum, over1.total, kPlanes * pitch);
  }
  end_chain(over1.sum, over1.total, kPlanes * pitch);
  if (!target1.max) return;
  for (int k = 0; k < kPlanes; ++k) {
    const int64_t at = k * pitch;
    for (int64_t i = at; i < at + pitch; i += kLanes) store(over1.sum + i, load(over1.total + i) / T(rows));
    propagate_nan(over1.max + at, over1.index + at, over1.sum + at, columns, columns, rows,
                  [&](int64_t column) HE_INLINE_LAMBDA { return first + k * plane + column; });
    const int64_t to = (a0 + k) * target1.row_stride;
    copy_rows(over1.max + at, pitch, 1, columns, target1.max + to, 0);
    copy_rows(over1.sum + at, pitch, 1, columns, target1.mean + to, 0);
    copy_rows(over1.index + at, pitch, 1, columns, target1.index + to, 0);
  }
}

// Pools the given planes of a sample. over0 receives these planes' part of the map over A0.
template <typename Element, typename T>
HE_INLINE void pool_part(const Element* x, const TripletLayout& layout, Range planes, PoolRows<T> over0,
                         PoolRows<T> over1, PoolTarget<T> target1, PoolTarget<T> target2) {
  const int64_t numel = layout.plane_padded();
  clear_pool(over0, numel);
  int64_t chained = 0;
  int64_t a0 = planes.begin;
  for (; a0 + kPlanesAtOnce <= planes.end; a0 += kPlanesAtOnce) {
    pool_planes<kPlanesAtOnce>(x, layout, a0, over0, over1, target1, target2);
    if ((chained += kPlanesAtOnce) == kChainLength) {
      end_chain(over0.sum, over0.total, numel);
      chained = 0;
    }
  }
  if (a0 < planes.end) pool_planes<1>(x, layout, a0, over0, over1, target1, target2);
  end_chain(over0.sum, over0.total, numel);
}

// For rows `rows` of A1: merges the parts of the map over A0 in order, and writes the result to `target`. The parts are
// consecutive in memory; the first part is overwritten.
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
        const int64_t part_at = part * layout.plane_padded() + at;
        const Lanes<T> other = load(all.max + part_at);
        const LaneMask<T> is_above = other > max;
        max = is_above ? other : max;
        index = is_above ? load(all.index + part_at) : index;
        total += load(all.total + part_at);
      }
      store(all.max + at, max);
      store(all.index + at, index);
      store(all.sum + at, total / T(layout.length[0]));
    }
    const int64_t at = row * pitch;
    propagate_nan(all.max + at, all.index + at, all.sum + at, columns, plane, layout.length[0],
                  [&](int64_t column) HE_INLINE_LAMBDA { return x + row * columns + column; });
  }
  const auto write = [&](auto* from, auto* to) HE_INLINE_LAMBDA {
    if (layout.axis0_is_transposed) {
      transpose_rows(from, pitch, rows.begin, rows.end, columns, to, layout.length[1], rows.end);
    } else {
      copy_rows(from + rows.begin * pitch, pitch, rows.end - rows.begin, columns, to + rows.begin * columns, columns);
    }
  };
  write(all.max, target.max);
  write(all.sum, target.mean);
  write(all.index, target.index);
}

}  // namespace hashengine
