// The memory layout of feature maps and branch maps for the CPU kernels of triplet attention, and the division of work.
//
// A feature map is [samples][A0][A1][A2], with the axes in memory order: C, H, W or H, W, C. In either layout, pooling
// over A0 and over A1 combines vectors along A2, and pooling over A2 reduces a row. The layouts differ only in which
// branch pools an axis, and in whether that branch's map is transposed. "The map over an axis" is the map of the branch
// that pools the axis. PaddedMaps (maps.h) pad each row to whole vectors, and the number of rows to a multiple of
// eight.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/triplet/rows.h"
#include "hashengine/triplet_attention.h"

namespace hashengine {

struct Range {
  int64_t begin;
  int64_t end;
};

// The shape of a branch's map for one sample, and its place among the maps that are passed in or returned.
struct TripletMap {
  int64_t rows;
  int64_t columns;
  int64_t pooled_length;
  int64_t offset;         // values per sample in the maps of the previous branches
  int64_t padded_offset;  // the same for padded maps

  int64_t numel() const { return rows * columns; }
  int64_t pitch() const { return round_up(columns, kLanes); }
  int64_t padded_numel() const { return round_up(rows, kLanes) * pitch(); }
};

struct TripletLayout {
  int64_t samples;
  int64_t length[3];  // A0, A1, A2
  int64_t pitch;      // values from one padded row along A2 to the next
  int branches;
  int branch[3];                     // the branch that pools each axis; kTripletBranches if there is none
  bool axis0_is_transposed;          // whether the map over A0 is stored as [A2, A1], not in x's order [A1, A2]
  bool axis2_is_transposed;          // whether the map over A2 is stored as [A1, A0], not in x's order [A0, A1]
  int64_t axis2_stride[2] = {0, 0};  // strides of A0 and A1 in the padded map over A2; zero if no branch pools A2
  TripletMap map[kTripletBranches];
  int64_t numel;         // values of all maps of a sample
  int64_t padded_numel;  // the same for padded maps
  int64_t parts;         // per sample; a part is a share of the planes [A1, A2] and of the rows of each map

  explicit TripletLayout(const TripletShape& shape) : samples(shape.samples), branches(shape.branches) {
    const int64_t c = shape.channels, h = shape.height, w = shape.width;
    const bool is_last = shape.layout == FeatureLayout::kChannelsLast;
    const int64_t sizes[2][3] = {{c, h, w}, {h, w, c}};
    const int pooling[2][3] = {{2, 0, 1}, {0, 1, 2}};  // C, H, W are pooled by the branches hw (2), cw (0), hc (1)
    // Per branch (cw, hc, hw): rows, columns, pooled length.
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
    axis0_is_transposed = is_last;
    axis2_is_transposed = !is_last;
    numel = offset;
    if (has(2)) {
      axis2_stride[axis2_is_transposed] = map_of(2).pitch();
      axis2_stride[!axis2_is_transposed] = 1;
    }
    parts = samples >= kEnoughTasks
                ? 1
                : std::min(ceil_div(kEnoughTasks, std::max<int64_t>(samples, 1)), ceil_div(length[0], kMinPartPlanes));
  }

  bool has(int axis) const { return branch[axis] < kTripletBranches; }
  const TripletMap& map_of(int axis) const { return map[branch[axis]]; }
  int64_t sample_numel() const { return length[0] * length[1] * length[2]; }
  int64_t plane_numel() const { return length[1] * length[2]; }
  int64_t plane_padded() const { return length[1] * pitch; }

  // The rows of part `part` if `count` rows are divided between the parts in multiples of `unit`.
  Range share(int64_t count, int64_t unit, int64_t part) const {
    const int64_t units = ceil_div(count, unit);
    return {std::min(count, units * part / parts * unit), std::min(count, units * (part + 1) / parts * unit)};
  }

 private:
  // The number of parts depends on the shape alone, so that sums are divided alike for every number of threads. Merging
  // one part is estimated to cost as much as pooling three planes.
  static constexpr int64_t kEnoughTasks = 8;
  static constexpr int64_t kMinPartPlanes = 16;
};

// Allocates consecutive pieces of scratch memory. Without a base it only measures how much is needed.
class ScratchArena {
 public:
  explicit ScratchArena(std::byte* base = nullptr) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    // One more vector, so that a row's last vector can be loaded whole.
    used_ += round_up((count + kLanes) * int64_t(sizeof(T)), kAlignment);
    return piece;
  }
  int64_t used() const { return used_; }

  static constexpr int64_t kAlignment = 64;

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

// An aligned block of uninitialised memory.
class ScratchBlock {
 public:
  explicit ScratchBlock(int64_t bytes)
      : memory_(static_cast<std::byte*>(::operator new(size_t(bytes), std::align_val_t{ScratchArena::kAlignment}))) {}
  std::byte* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{ScratchArena::kAlignment}); }
  };
  std::unique_ptr<std::byte, Free> memory_;
};

// Calls phase(sample, part, scratch) for all phases, samples and parts. A phase of a sample starts when all parts of
// the sample have finished the previous phase. A sample of a single part goes through all phases while it is in the
// cache. bytes: the scratch memory of a sample, which its parts share. last_first: each thread processes its samples in
// descending order, because its last samples may still be in the cache from the previous call. If samples have several
// parts, last_first has no effect.
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
