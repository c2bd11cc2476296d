// The maps of one sample in triplet attention. SampleMaps are not padded; they are in the caller's buffers or in
// scratch memory. PaddedMaps are in scratch memory, for the passes over x. The axes A0, A1, A2, "the map over an axis"
// and "part" are explained in layout.h.
#pragma once

#include "cpu/triplet/gate.h"
#include "cpu/triplet/pool.h"

namespace hashengine {

// A branch's maps of one sample.
template <typename T>
struct BranchMaps {
  T* pooled;       // [2, rows, columns]: maximum and mean
  int32_t* index;  // of the maximum
  T* response;     // the result of the convolution
};

template <typename T>
struct SampleMaps {
  BranchMaps<T> branch[kTripletBranches] = {};

  SampleMaps() = default;
  // Maps in the buffers that are saved for the backward.
  SampleMaps(const TripletLayout& layout, const TripletSaved& saved, int64_t sample) {
    for (int b = 0; b < layout.branches; ++b) {
      const TripletMap& map = layout.map[b];
      const int64_t at = layout.samples * map.offset + sample * map.numel();
      branch[b] = {static_cast<T*>(saved.pooled) + 2 * at, saved.index + at, static_cast<T*>(saved.response) + at};
    }
  }
  // Maps in scratch memory, for a forward that saves nothing.
  SampleMaps(const TripletLayout& layout, ScratchArena& scratch) {
    for (int b = 0; b < layout.branches; ++b) {
      const int64_t numel = layout.map[b].numel();
      branch[b] = {scratch.take<T>(2 * numel), scratch.take<int32_t>(numel), scratch.take<T>(numel)};
    }
  }
};

// The memory to which pooling writes the map over an axis; null pointers if no branch pools the axis.
template <typename T>
PoolTarget<T> pool_target(const TripletLayout& layout, const SampleMaps<T>& maps, int axis) {
  if (!layout.has(axis)) return {};
  const TripletMap& map = layout.map_of(axis);
  const BranchMaps<T>& to = maps.branch[layout.branch[axis]];
  const bool is_transposed = axis == 2 && layout.axis2_is_transposed;
  return {to.pooled, to.pooled + map.numel(), to.index, is_transposed ? 1 : map.columns,
          is_transposed ? map.columns : 1};
}

// Copies rows of a map to a padded map, multiplied by `scale`.
template <typename T>
HE_INLINE void pad_rows(const T* from, const TripletMap& map, Range rows, T scale, T* to) {
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for_row(map.columns, map.rows - row, [&](int64_t column, auto extent) HE_INLINE_LAMBDA {
      store(to + row * map.pitch() + column, load(from + row * map.columns + column, extent) * scale);
    });
}
// Copies rows of a map of indices to a padded map and converts the indices to integers as wide as T.
template <typename T>
HE_INLINE void pad_index_rows(const int32_t* from, const TripletMap& map, Range rows, LaneIndex<T>* to) {
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for_row(map.columns, map.rows - row, [&](int64_t column, auto extent) HE_INLINE_LAMBDA {
      const auto index = load(from + row * map.columns + column, extent);
      store(to + row * map.pitch() + column, __builtin_convertvector(index, LaneMask<T>));
    });
}

// A sample's padded maps, each in the orientation of its branch. If the map over A0 is not in x's orientation, a second
// copy of it is stored in x's orientation. Maps over axes that no branch pools are zero.
template <typename S>
struct PaddedMaps {
  S* maps;
  S* axis0;  // the map over A0 in x's orientation; null if the map in `maps` has that orientation
  S* zero;   // a single zero, which replaces the map over A2 if no branch pools A2

  PaddedMaps(const TripletLayout& layout, ScratchArena& scratch)
      : maps(scratch.take<S>(layout.padded_numel)),
        axis0(layout.has(0) && !layout.axis0_is_transposed ? nullptr : scratch.take<S>(layout.plane_padded())),
        zero(scratch.take<S>(1)) {}

  S* branch(const TripletLayout& layout, int b) const { return maps + layout.map[b].padded_offset; }

  MapPointers<S> pointers(const TripletLayout& layout) const {
    return {{axis0 ? axis0 : branch(layout, layout.branch[0]), branch(layout, layout.branch[1]),
             layout.has(2) ? branch(layout, layout.branch[2]) : zero}};
  }

  // Must be called after the part's rows of each map are written. Writes `zero` and the part's rows of `axis0`.
  HE_INLINE void finish(const TripletLayout& layout, int64_t part) const {
    if (part == 0) *zero = S(0);
    if (!layout.has(0)) {
      const Range rows = layout.share(layout.length[1], 1, part);
      std::fill(axis0 + rows.begin * layout.pitch, axis0 + rows.end * layout.pitch, S(0));
    } else if (axis0) {
      const TripletMap& map = layout.map_of(0);
      const Range rows = layout.share(map.rows, kLanes, part);
      transpose_rows(branch(layout, layout.branch[0]), map.pitch(), rows.begin, rows.end, map.columns, axis0,
                     layout.pitch, layout.pitch);
    }
  }
};

}  // namespace hashengine
