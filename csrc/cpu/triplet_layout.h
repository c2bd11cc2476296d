// How triplet attention's CPU kernels see a feature map and its maps in memory, and how they share the work.
//
// x is [samples][A0][A1][A2], the axes in the order of memory: C, H, W or H, W, C. Whatever the layout, the pooling of
// A0 and of A1 adds up vectors along A2, and that of A2 folds a row; only which branch that is differs, and whether its
// map lies turned. Maps in scratch memory are padded: rows of whole vectors, a multiple of eight of them.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "hashengine/triplet_attention.h"
#include "triplet_rows.h"

namespace hashengine {

struct Range {
  int64_t begin;
  int64_t end;
};

// A branch's map of one sample, as the seam keeps it.
struct TripletMap {
  int64_t rows;
  int64_t columns;
  int64_t pooled_length;
  int64_t offset;         // values of one sample in the branches before
  int64_t padded_offset;  // the same in padded maps

  int64_t numel() const { return rows * columns; }
  int64_t pitch() const { return round_up(columns, kLanes); }
  int64_t padded_numel() const { return round_up(rows, kLanes) * pitch(); }
};

struct TripletLayout {
  int64_t samples;
  int64_t length[3];  // A0, A1, A2
  int64_t pitch;      // of a row along A2, in whole vectors
  int branches;
  int branch[3];                     // which branch pools the axis; kTripletBranches where none does
  bool axis0_is_turned;              // whether the map that pools A0, [A1, A2] in x's order, lies as [A2, A1]
  bool axis2_is_turned;              // the same for the map that pools A2, [A0, A1]
  int64_t axis2_stride[2] = {0, 0};  // of A0 and A1 in the padded map that pools A2; a single zero stands for none
  TripletMap map[kTripletBranches];
  int64_t numel;         // of all maps of a sample
  int64_t padded_numel;  // the same padded
  int64_t parts;         // into which a sample's A0, and the rows of its maps, are split

  explicit TripletLayout(const TripletShape& shape) : samples(shape.samples), branches(shape.branches) {
    const int64_t c = shape.channels, h = shape.height, w = shape.width;
    const bool is_last = shape.layout == FeatureLayout::kChannelsLast;
    const int64_t sizes[2][3] = {{c, h, w}, {h, w, c}};
    const int pooling[2][3] = {{2, 0, 1}, {0, 1, 2}};  // C, H, W are pooled by hw, cw, hc
    const int64_t maps[kTripletBranches][3] = {{c, w, h}, {h, c, w}, {h, w, c}};
    for (int axis = 0; axis < 3; ++axis) {
      length[axis] = sizes[is_last][axis];
      branch[axis] = pooling[is_last][axis] < branches ? pooling[is_last][axis] : kTripletBranches;
    }
    pitch = round_up(length[2], kLanes);
    padded_numel = 0;
    int64_t offset = 0;
    for (int b = 0; b < branches; ++b) {
      map[b] = {maps[b][0], maps[b][1], maps[b][2], offset, padded_numel};
      offset += map[b].numel();
      padded_numel += map[b].padded_numel();
    }
    axis0_is_turned = is_last;
    axis2_is_turned = !is_last;
    numel = offset;
    if (has(2)) {
      axis2_stride[axis2_is_turned] = map_of(2).pitch();
      axis2_stride[!axis2_is_turned] = 1;
    }
    parts = samples >= kEnoughTasks
                ? 1
                : std::min(ceil_div(kEnoughTasks, std::max<int64_t>(samples, 1)), ceil_div(length[0], kLeastPlanes));
  }

  bool has(int axis) const { return branch[axis] < kTripletBranches; }
  const TripletMap& map_of(int axis) const { return map[branch[axis]]; }
  int64_t sample_numel() const { return length[0] * length[1] * length[2]; }
  int64_t plane_numel() const { return length[1] * length[2]; }
  int64_t plane_padded() const { return length[1] * pitch; }

  // The part's share of `count` rows, in units of `unit`.
  Range share(int64_t count, int64_t unit, int64_t part) const {
    const int64_t units = ceil_div(count, unit);
    return {std::min(count, units * part / parts * unit), std::min(count, units * (part + 1) / parts * unit)};
  }

 private:
  // A rule of the shape alone, so that sums are split alike for every number of threads. Merging the parts costs as
  // much as pooling about three planes.
  static constexpr int64_t kEnoughTasks = 8;
  static constexpr int64_t kLeastPlanes = 16;
};

// Hands out scratch memory piece by piece; without a base it only counts.
class Scratch {
 public:
  explicit Scratch(std::byte* base = nullptr) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    // One vector more than asked, so that a row's last vector can be read whole.
    used_ += round_up((count + kLanes) * int64_t(sizeof(T)), kAlignment);
    return piece;
  }
  int64_t used() const { return used_; }

  static constexpr int64_t kAlignment = 64;

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

class ScratchBlock {
 public:
  explicit ScratchBlock(int64_t bytes)
      : memory_(static_cast<std::byte*>(::operator new(size_t(bytes), std::align_val_t{Scratch::kAlignment}))) {}
  std::byte* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{Scratch::kAlignment}); }
  };
  std::unique_ptr<std::byte, Free> memory_;
};

// Runs the phases phase(sample, part, scratch) for all samples and parts; within a sample, a phase begins when all
// parts have ended the one before. Whole samples go through all phases while they are in the cache. `bytes` is the
// scratch of a sample, which its parts share. Samples go backwards where `last_first`: the last ones are still in the
// cache from the pass before.
template <typename... Phases>
void run_phases(const ThreadPool& pool, const TripletLayout& layout, int64_t bytes, bool last_first, Phases... phases) {
  const int64_t samples = layout.samples, parts = layout.parts;
  if (parts == 1) {
    parallel_for(pool, samples, 1, [&](int64_t begin, int64_t end) {
      const ScratchBlock scratch(bytes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = last_first ? begin + end - 1 - i : i;
        (phases(sample, 0, scratch.get()), ...);
      }
    });
    return;
  }
  const ScratchBlock scratch(bytes * samples);
  const auto run = [&](auto& phase) {
    parallel_for(pool, samples * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        phase(task / parts, task % parts, scratch.get() + task / parts * bytes);
    });
  };
  (run(phases), ...);
}

}  // namespace hashengine
