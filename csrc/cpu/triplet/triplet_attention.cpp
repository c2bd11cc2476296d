// triplet_attention on the CPU: the forward, in training and in inference.
//
// Idea. Two passes over x: the first pools all three axes (pool.h), the second applies the gates (gate.h). Between them
// the small maps are convolved (conv.h) and normalised (norm.h).
//
// Memory traffic for N elements of s bytes. Training: 3Ns, the floor. With running statistics, a sample that is not
// split into parts runs through all phases before the next sample starts. If it stays in the cache, x is read from
// memory once: 2Ns. In addition, 16 bytes per value of the maps are written if they are saved for the backward (pooled,
// index, response; 28 bytes with float64).
//
// Threads. A task is a sample or, in a small batch, a part of a sample (layout.h). A task's sums have a fixed order,
// and the sums of the tasks are added in order, so that the results have the same bits for every number of threads.

#include "hashengine/triplet_attention.h"

#include <vector>

#include "cpu/triplet/conv.h"
#include "cpu/triplet/maps.h"
#include "cpu/triplet/norm.h"

namespace hashengine {
namespace {

// The phases that process the maps. They do not depend on the element type of x.
template <typename T>
class ForwardMaps {
 protected:
  // Saves nothing for the backward if p.saved.mean is null.
  ForwardMaps(const TripletForward& p, SimdLevel level, const ThreadPool& pool)
      : p_(p),
        layout_(p.shape),
        strip_sizes_(layout_, p.shape.kernel_size),
        level_(level),
        pool_(pool),
        moments_(size_t(layout_.samples * layout_.parts * kTripletBranches)) {}

  // A part of a sample, and its scratch memory.
  struct Task {
    Task(const ForwardMaps& forward, int64_t sample_index, int64_t part_index, std::byte* memory)
        : Task(forward, forward.layout_, sample_index, part_index, ScratchArena(memory)) {}
    Task(const ForwardMaps& forward, const TripletLayout& layout, int64_t sample_index, int64_t part_index,
         ScratchArena scratch)
        : sample(sample_index),
          part(part_index),
          planes(layout.share(layout.length[0], 1, part)),
          over0(scratch, layout.parts * layout.plane_padded()),
          over1(scratch, layout.parts * kPlanesAtOnce * layout.pitch),
          strip(scratch.take<T>(layout.parts * forward.strip_sizes_.strip)),
          result(scratch.take<T>(layout.parts * forward.strip_sizes_.result)),
          gates(layout, scratch),
          maps(forward.p_.saved.mean ? SampleMaps<T>(layout, forward.p_.saved, sample)
                                     : SampleMaps<T>(layout, scratch)),
          bytes(scratch.used()) {}

    int64_t sample;
    int64_t part;
    Range planes;
    PoolRows<T> over0;
    PoolRows<T> over1;
    T* strip;
    T* result;
    PaddedMaps<T> gates;
    SampleMaps<T> maps;
    int64_t bytes;
  };

  template <typename Work>
  auto phase(Work work) const {
    return [this, work](int64_t sample, int64_t part, std::byte* memory) {
      const Task task(*this, sample, part, memory);
      run_at_level<T>(level_, [&]() HE_INLINE_LAMBDA { work(task); });
    };
  }

  void convolve_maps(int64_t sample, int64_t part, std::byte* memory) {
    phase([this](const Task& task) HE_INLINE_LAMBDA { convolve(task); })(sample, part, memory);
  }
  void make_gates(int64_t sample, int64_t part, std::byte* memory) const {
    phase([this](const Task& task) HE_INLINE_LAMBDA { gate(task); })(sample, part, memory);
  }

  HE_INLINE void convolve(const Task& task) {
    for (int b = 0; b < layout_.branches; ++b) {
      TripletMoments& moments = moments_[size_t((task.sample * layout_.parts + task.part) * kTripletBranches + b)];
      if (p_.shape.kernel_size == 7) {
        convolve_map<7>(task, b, moments);
      } else {
        convolve_map<0>(task, b, moments);
      }
    }
  }

  template <int kKernel>
  HE_INLINE void convolve_map(const Task& task, int b, TripletMoments& moments) const {
    const TripletMap map = layout_.map[b];
    const BranchMaps<T> maps = task.maps.branch[b];
    const int kernel_size = p_.shape.kernel_size;
    const auto* weight = static_cast<const T*>(p_.parameters.conv_weight[b]);
    const TripletTiles tiles(map, layout_.parts);
    TripletStrip<T> strip(task.strip + task.part * strip_sizes_.strip, tiles, kernel_size, 2);
    T* const result = task.result + task.part * strip_sizes_.result;
    const Range share = tiles.share(layout_.parts, task.part);
    for (int64_t number = share.begin; number < share.end; ++number) {
      const MapTile tile = tiles[number];
      strip.prepare(tile);
      for (int plane = 0; plane < 2; ++plane)
        fill_strip(strip, plane, map, tile, [&](int64_t row, int64_t column, auto extent) HE_INLINE_LAMBDA {
          return load(maps.pooled + plane * map.numel() + row * map.columns + column, extent);
        });
      convolve_strip<kKernel>(strip, 2, weight, kernel_size, tile, result, tiles.columns);
      if (p_.training) moments.add(moments_of_rows(result, tiles.columns, tile.height(), tile.width()));
      T* const response = maps.response + tile.rows.begin * map.columns + tile.columns.begin;
      copy_rows(result, tiles.columns, tile.height(), tile.width(), response, map.columns, tiles.across == 1);
    }
  }

  void use_batch_statistics() {
    for (int b = 0; b < layout_.branches; ++b) {
      TripletMoments all;
      for (size_t i = size_t(b); i < moments_.size(); i += kTripletBranches) all.add(moments_[i]);
      use_statistics(b, T(all.mean), T(all.squares / all.count));
    }
  }

  void use_running_statistics() {
    for (int b = 0; b < layout_.branches; ++b)
      use_statistics(b, *static_cast<const T*>(p_.running_mean[b]), *static_cast<const T*>(p_.running_var[b]));
  }

  void use_statistics(int b, T mean, T var) {
    norm_[b] = make_norm(p_.parameters, b, mean, var);
    if (!p_.saved.mean) return;
    static_cast<T*>(p_.saved.mean)[b] = mean;
    static_cast<T*>(p_.saved.var)[b] = var;
  }

  HE_INLINE void gate(const Task& task) const {
    const T scale = T(1) / T(layout_.branches);
    for (int b = 0; b < layout_.branches; ++b) {
      const TripletMap map = layout_.map[b];
      gate_rows(task.maps.branch[b].response, map, layout_.share(map.rows, kLanes, task.part), norm_[b], scale,
                task.gates.branch(layout_, b));
    }
    task.gates.finish(layout_, task.part);
  }

  const TripletForward& p_;
  const TripletLayout layout_;
  const StripSizes strip_sizes_;
  const SimdLevel level_;
  const ThreadPool& pool_;
  std::vector<TripletMoments> moments_;
  TripletNorm<T> norm_[kTripletBranches] = {};
};

template <typename Element>
class Forward : ForwardMaps<typename Arithmetic<Element>::Type> {
  using T = typename Arithmetic<Element>::Type;
  using Maps = ForwardMaps<T>;
  using Maps::layout_;
  using Maps::p_;
  using Maps::pool_;
  using typename Maps::Task;

 public:
  Forward(const TripletForward& p, SimdLevel level, const ThreadPool& pool) : Maps(p, level, pool) {}

  void run() {
    const auto pooling = this->phase([this](const Task& task) HE_INLINE_LAMBDA { pool(task); });
    const auto merging = this->phase([this](const Task& task) HE_INLINE_LAMBDA { merge_parts(task); });
    const auto applying = this->phase([this](const Task& task) HE_INLINE_LAMBDA { apply_gates(task); });
    const auto convolving = [this](auto... task) { this->convolve_maps(task...); };
    const auto gating = [this](auto... task) { this->make_gates(task...); };
    const int64_t bytes = Task(*this, 0, 0, nullptr).bytes;
    if (p_.training) {
      run_phases(pool_, layout_, bytes, false, pooling, merging, convolving);
      this->use_batch_statistics();
      run_phases(pool_, layout_, bytes, true, gating, applying);
    } else {
      this->use_running_statistics();
      run_phases(pool_, layout_, bytes, false, pooling, merging, convolving, gating, applying);
    }
  }

 private:
  const Element* x(const Task& task) const {
    return static_cast<const Element*>(p_.x) + task.sample * layout_.sample_numel();
  }

  HE_INLINE void pool(const Task& task) const {
    pool_part(x(task), layout_, task.planes, task.over0.from(task.part * layout_.plane_padded()),
              task.over1.from(task.part * kPlanesAtOnce * layout_.pitch), pool_target(layout_, task.maps, 1),
              pool_target(layout_, task.maps, 2));
  }

  HE_INLINE void merge_parts(const Task& task) const {
    finish_axis0(x(task), layout_, layout_.share(layout_.length[1], kLanes, task.part), task.over0,
                 pool_target(layout_, task.maps, 0));
  }

  HE_INLINE void apply_gates(const Task& task) const {
    Element* const y = static_cast<Element*>(p_.y) + task.sample * layout_.sample_numel();
    gate_part(x(task), y, layout_, task.planes, task.gates.pointers(layout_));
  }
};

}  // namespace

void triplet_forward_cpu(const TripletForward& p, SimdLevel level, const ThreadPool& pool) {
  return with_element(p.shape.dtype, [&](auto element) { return Forward<decltype(element)>(p, level, pool).run(); });
}

void triplet_inference_cpu(const TripletInference& p, SimdLevel level, const ThreadPool& pool) {
  TripletForward forward{p.x, p.y, p.parameters, {}, {}, {}, false, p.shape};
  std::copy(p.running_mean, p.running_mean + kTripletBranches, forward.running_mean);
  std::copy(p.running_var, p.running_var + kTripletBranches, forward.running_var);
  triplet_forward_cpu(forward, level, pool);
}

}  // namespace hashengine
