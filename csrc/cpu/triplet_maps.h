// Where triplet attention's maps lie: as the seam saves them, and in scratch memory as the passes over x want them.
#pragma once

#include "triplet_gate.h"
#include "triplet_pool.h"

namespace hashengine {

// A branch's maps of one sample.
template <typename T>
struct BranchMaps {
  T* pooled;
  int32_t* index;
  T* response;
};

template <typename T>
struct SampleMaps {
  BranchMaps<T> branch[kTripletBranches] = {};

  SampleMaps() = default;
  // Where the seam saves them.
  SampleMaps(const TripletLayout& layout, const TripletSaved& saved, int64_t sample) {
    for (int b = 0; b < layout.branches; ++b) {
      const TripletMap& map = layout.map[b];
      const int64_t at = layout.samples * map.offset + sample * map.numel();
      branch[b] = {static_cast<T*>(saved.pooled) + 2 * at, saved.index + at, static_cast<T*>(saved.response) + at};
    }
  }
  // Where nothing is saved.
  SampleMaps(const TripletLayout& layout, Scratch& scratch) {
    for (int b = 0; b < layout.branches; ++b) {
      const int64_t numel = layout.map[b].numel();
      branch[b] = {scratch.take<T>(2 * numel), scratch.take<int32_t>(numel), scratch.take<T>(numel)};
    }
  }
};

// The maps of an axis as its pooling writes them.
template <typename T>
PoolTarget<T> pool_target(const TripletLayout& layout, const SampleMaps<T>& maps, int axis) {
  if (!layout.has(axis)) return {};
  const TripletMap& map = layout.map_of(axis);
  const BranchMaps<T>& to = maps.branch[layout.branch[axis]];
  const bool is_turned = axis == 2 && layout.axis2_is_turned;
  return {to.pooled, to.pooled + map.numel(), to.index, is_turned ? 1 : map.columns, is_turned ? map.columns : 1};
}

// Rows of a saved map, padded.
template <typename T>
HE_INLINE void pad_rows(const T* from, const TripletMap& map, Range rows, T scale, T* to) {
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for_row(map.columns, map.rows - row, [&](int64_t column, auto part) HE_INLINE_LAMBDA {
      store(to + row * map.pitch() + column, load(from + row * map.columns + column, part) * scale);
    });
}
template <typename T>
HE_INLINE void pad_index_rows(const int32_t* from, const TripletMap& map, Range rows, LaneIndex<T>* to) {
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for_row(map.columns, map.rows - row, [&](int64_t column, auto part) HE_INLINE_LAMBDA {
      const auto index = load(from + row * map.columns + column, part);
      store(to + row * map.pitch() + column, __builtin_convertvector(index, LaneMask<T>));
    });
}

// A value for each place of each map of a sample: padded, in the maps' own orientation, and that of A0 once more in
// x's.
template <typename S>
struct AxisMaps {
  S* maps;
  S* axis0;  // null where the map lies right as it is
  S* none;   // one zero, in place of the map over A2 that a layer without one lacks

  AxisMaps(const TripletLayout& layout, Scratch& scratch)
      : maps(scratch.take<S>(layout.padded_numel)),
        axis0(layout.has(0) && !layout.axis0_is_turned ? nullptr : scratch.take<S>(layout.plane_padded())),
        none(scratch.take<S>(1)) {}

  S* branch(const TripletLayout& layout, int b) const { return maps + layout.map[b].padded_offset; }

  OverAxes<S> over_axes(const TripletLayout& layout) const {
    return {{axis0 ? axis0 : branch(layout, layout.branch[0]), branch(layout, layout.branch[1]),
             layout.has(2) ? branch(layout, layout.branch[2]) : none}};
  }

  // Once the part's share of each map is there.
  HE_INLINE void spread(const TripletLayout& layout, int64_t part) const {
    if (part == 0) *none = S(0);
    if (!layout.has(0)) {
      const Range rows = layout.share(layout.length[1], 1, part);
      std::fill(axis0 + rows.begin * layout.pitch, axis0 + rows.end * layout.pitch, S(0));
    } else if (axis0) {
      const TripletMap& map = layout.map_of(0);
      const Range rows = layout.share(map.rows, kLanes, part);
      turn_rows(branch(layout, layout.branch[0]), map.pitch(), rows.begin, rows.end, map.columns, axis0, layout.pitch,
                layout.pitch);
    }
  }
};

}  // namespace hashengine
