// triplet_attention on the CPU: the backward.
//
// Idea. Two passes over feature maps: the first sums grad_y * x over each axis, which gives the gradients of the gates;
// the second writes grad_x (both in gate.h). Between them the gradients go back through sigmoid, BatchNorm and
// convolution on the maps (maps.h), usually much smaller than x. The backward of BatchNorm needs two sums over the
// whole batch, so the samples are processed in two rounds.
//
// Memory traffic for N elements of s bytes: 4Ns, the floor, and 24 bytes per value of the maps (44 with float64):
// pooled, index and response are read; the gradients of the gates are written and read.
//
// Tasks and the order of sums are the same as in the forward.

#include <vector>

#include "cpu/triplet/conv.h"
#include "cpu/triplet/maps.h"
#include "cpu/triplet/norm.h"
#include "hashengine/triplet_attention.h"

namespace hashengine {
namespace {

// The phases that process the maps. They do not depend on the element type of x.
template <typename T>
class BackwardMaps {
 protected:
  BackwardMaps(const TripletBackward& p, SimdLevel level, const ThreadPool& pool)
      : p_(p),
        layout_(p.shape),
        taps_(p.shape.kernel_size * p.shape.kernel_size),
        strip_sizes_(layout_, p.shape.kernel_size),
        level_(level),
        pool_(pool),
        gradients_((layout_.samples * layout_.padded_numel + kLanes) *
                   int64_t(sizeof(T))),  // + kLanes: vectors are loaded whole
        affine_sums_(size_t(layout_.samples * layout_.parts * kTripletBranches)),
        weight_sums_(size_t(layout_.samples * layout_.parts * layout_.branches * 2 * taps_)) {
    for (int b = 0; b < layout_.branches; ++b) {
      const T mean = static_cast<const T*>(p.saved.mean)[b], var = static_cast<const T*>(p.saved.var)[b];
      norm_[b] = {make_norm(p.parameters, b, mean, var)};
      flip_weights(b);
    }
  }

  // A part of a sample, and its scratch memory.
  struct Task {
    Task(const BackwardMaps& backward, int64_t sample_index, int64_t part_index, std::byte* memory)
        : Task(backward, backward.layout_, sample_index, part_index, ScratchArena(memory)) {}
    Task(const BackwardMaps& backward, const TripletLayout& layout, int64_t sample_index, int64_t part_index,
         ScratchArena scratch)
        : sample(sample_index),
          part(part_index),
          planes(layout.share(layout.length[0], 1, part)),
          over0(scratch, layout.parts * layout.plane_padded()),
          over1(scratch, layout.parts * kPlanesAtOnce * layout.pitch),
          pooled_strip(scratch.take<T>(layout.parts * backward.strip_sizes_.strip)),
          gradient_strip(scratch.take<T>(layout.parts * backward.strip_sizes_.strip)),
          gate(layout, scratch),
          mean_grad(layout, scratch),
          max_grad(layout, scratch),
          max_index(layout, scratch),
          maps(layout, backward.p_.saved, sample),
          bytes(scratch.used()) {}

    int64_t sample;
    int64_t part;
    Range planes;
    SumRows<T> over0;
    SumRows<T> over1;
    T* pooled_strip;
    T* gradient_strip;
    PaddedMaps<T> gate;
    PaddedMaps<T> mean_grad;
    PaddedMaps<T> max_grad;
    PaddedMaps<LaneIndex<T>> max_index;
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

  // The padded map of a branch, for the task's sample. At first it contains the sums of grad_y * x, then the gradient
  // of BatchNorm's output.
  T* gradient(const Task& task, int b) const {
    return reinterpret_cast<T*>(gradients_.get()) + task.sample * layout_.padded_numel + layout_.map[b].padded_offset;
  }
  size_t task_index(const Task& task) const { return size_t(task.sample * layout_.parts + task.part); }

  void merge_parts(int64_t sample, int64_t part, std::byte* memory) const {
    phase([this](const Task& task) HE_INLINE_LAMBDA { merge(task); })(sample, part, memory);
  }
  void run_gate_backward(int64_t sample, int64_t part, std::byte* memory) {
    phase([this](const Task& task) HE_INLINE_LAMBDA { gate_backward(task); })(sample, part, memory);
  }
  void run_conv_backward(int64_t sample, int64_t part, std::byte* memory) {
    phase([this](const Task& task) HE_INLINE_LAMBDA { conv_backward(task); })(sample, part, memory);
  }
  void run_pad_maps(int64_t sample, int64_t part, std::byte* memory) const {
    phase([this](const Task& task) HE_INLINE_LAMBDA { pad_maps(task); })(sample, part, memory);
  }

  HE_INLINE void merge(const Task& task) const {
    if (!layout_.has(0)) return;
    finish_sums(layout_, layout_.share(layout_.length[1], kLanes, task.part), task.over0,
                gradient(task, layout_.branch[0]), layout_.map_of(0).pitch());
  }

  HE_INLINE void gate_backward(const Task& task) {
    for (int b = 0; b < layout_.branches; ++b) {
      const TripletMap map = layout_.map[b];
      affine_sums_[task_index(task) * kTripletBranches + size_t(b)] =
          gate_backward_rows(gradient(task, b), task.maps.branch[b].response, map,
                             layout_.share(map.rows, kLanes, task.part), norm_[b].norm, T(1) / T(layout_.branches));
    }
  }

  void add_affine_gradients() {
    for (int b = 0; b < layout_.branches; ++b) {
      AffineSums all;
      for (size_t i = size_t(b); i < affine_sums_.size(); i += kTripletBranches) {
        all.bias += affine_sums_[i].bias;
        all.weight += affine_sums_[i].weight;
      }
      static_cast<T*>(p_.grad_bn_bias)[b] = T(all.bias);
      static_cast<T*>(p_.grad_bn_weight)[b] = T(all.weight);
      if (!p_.training) continue;
      const double count = double(layout_.samples * layout_.map[b].numel());
      norm_[b].mean_gradient = T(all.bias / count);
      norm_[b].mean_product = T(all.weight / count);
    }
  }

  HE_INLINE void conv_backward(const Task& task) {
    for (int b = 0; b < layout_.branches; ++b) {
      switch (p_.shape.kernel_size) {
        case 7: conv_backward_of_branch<7, 7>(task, b); break;
        case 3: conv_backward_of_branch<3, 3>(task, b); break;
        default: conv_backward_of_branch<0, 1>(task, b);
      }
    }
  }

  template <int kKernel, int kTaps>
  HE_INLINE void conv_backward_of_branch(const Task& task, int b) {
    const TripletMap map = layout_.map[b];
    const BranchMaps<T> maps = task.maps.branch[b];
    const NormBackward<T> norm = norm_[b];
    const T* const gradients = gradient(task, b);
    const int kernel_size = p_.shape.kernel_size;
    const int64_t pitch = map.pitch(), at = task.part * strip_sizes_.strip;
    const TripletTiles tiles(map, layout_.parts);
    TripletStrip<T> pooled(task.pooled_strip + at, tiles, kernel_size, 2);
    TripletStrip<T> gradient_strip(task.gradient_strip + at, tiles, kernel_size, 1);
    double* const weight_sums =
        weight_sums_.data() + (task_index(task) * size_t(layout_.branches) + size_t(b)) * size_t(2 * taps_);
    const T* const weight = flipped_weight_[b].data();
    const Range share = tiles.share(layout_.parts, task.part);
    for (int64_t number = share.begin; number < share.end; ++number) {
      const MapTile tile = tiles[number];
      pooled.prepare(tile);
      gradient_strip.prepare(tile);
      for (int plane = 0; plane < 2; ++plane)
        fill_strip(pooled, plane, map, tile, [&](int64_t row, int64_t column, auto extent) HE_INLINE_LAMBDA {
          return load(maps.pooled + plane * map.numel() + row * map.columns + column, extent);
        });
      fill_strip(gradient_strip, 0, map, tile, [&](int64_t row, int64_t column, auto extent) HE_INLINE_LAMBDA {
        return norm(load(gradients + row * pitch + column), load(maps.response + row * map.columns + column, extent));
      });
      add_weight_gradient<kTaps>(pooled, 2, gradient_strip, kernel_size, tile, weight_sums);
      for (int plane = 0; plane < 2; ++plane) {
        const PaddedMaps<T>& to = plane == 0 ? task.max_grad : task.mean_grad;
        convolve_strip<kKernel>(gradient_strip, 1, weight + plane * taps_, kernel_size, tile,
                                to.branch(layout_, b) + tile.rows.begin * pitch + tile.columns.begin, pitch);
      }
    }
  }

  HE_INLINE void pad_maps(const Task& task) const {
    for (int b = 0; b < layout_.branches; ++b) {
      const TripletMap map = layout_.map[b];
      const BranchMaps<T> maps = task.maps.branch[b];
      const Range rows = layout_.share(map.rows, kLanes, task.part);
      gate_rows(maps.response, map, rows, norm_[b].norm, T(1) / T(layout_.branches), task.gate.branch(layout_, b));
      pad_index_rows<T>(maps.index, map, rows, task.max_index.branch(layout_, b));
    }
    task.gate.finish(layout_, task.part);
    task.mean_grad.finish(layout_, task.part);
    task.max_grad.finish(layout_, task.part);
    task.max_index.finish(layout_, task.part);
  }

  // The gradient of the convolution's input is a convolution with the flipped kernel. Dividing the weights of the mean
  // by the pooled length gives mean_grad directly.
  void flip_weights(int b) {
    const auto* weight = static_cast<const T*>(p_.parameters.conv_weight[b]);
    flipped_weight_[b].resize(size_t(2 * taps_));
    for (int64_t i = 0; i < taps_; ++i) {
      flipped_weight_[b][size_t(i)] = weight[taps_ - 1 - i];
      flipped_weight_[b][size_t(taps_ + i)] = weight[2 * taps_ - 1 - i] / T(layout_.map[b].pooled_length);
    }
  }

  void add_weight_gradients() {
    const size_t numel = size_t(layout_.branches * 2 * taps_);
    for (size_t i = 0; i < numel; ++i) {
      double total = 0;
      for (size_t at = i; at < weight_sums_.size(); at += numel) total += weight_sums_[at];
      static_cast<T*>(p_.grad_conv_weight)[i] = T(total);
    }
  }

  const TripletBackward& p_;
  const TripletLayout layout_;
  const int64_t taps_;  // per plane
  const StripSizes strip_sizes_;
  const SimdLevel level_;
  const ThreadPool& pool_;
  ScratchBlock gradients_;
  std::vector<AffineSums> affine_sums_;
  std::vector<double> weight_sums_;
  NormBackward<T> norm_[kTripletBranches] = {};
  std::vector<T> flipped_weight_[kTripletBranches];
};

template <typename Element>
class Backward : BackwardMaps<typename Arithmetic<Element>::Type> {
  using T = typename Arithmetic<Element>::Type;
  using Maps = BackwardMaps<T>;
  using Maps::layout_;
  using Maps::p_;
  using Maps::pool_;
  using typename Maps::Task;

 public:
  Backward(const TripletBackward& p, SimdLevel level, const ThreadPool& pool) : Maps(p, level, pool) {}

  void run() {
    const auto summing = this->phase([this](const Task& task) HE_INLINE_LAMBDA { sum_products(task); });
    const auto merging = [this](auto... task) { this->merge_parts(task...); };
    const auto gates_backward = [this](auto... task) { this->run_gate_backward(task...); };
    const auto convs_backward = [this](auto... task) { this->run_conv_backward(task...); };
    const auto padding = [this](auto... task) { this->run_pad_maps(task...); };
    const auto writing = this->phase([this](const Task& task) HE_INLINE_LAMBDA { write_grad_x(task); });
    const int64_t bytes = Task(*this, 0, 0, nullptr).bytes;
    run_phases(pool_, layout_, bytes, false, summing, merging, gates_backward);
    this->add_affine_gradients();
    run_phases(pool_, layout_, bytes, true, convs_backward, padding, writing);
    this->add_weight_gradients();
  }

 private:
  const Element* x(const Task& task) const {
    return static_cast<const Element*>(p_.x) + task.sample * layout_.sample_numel();
  }
  const Element* grad_y(const Task& task) const {
    return static_cast<const Element*>(p_.grad_y) + task.sample * layout_.sample_numel();
  }
  HE_INLINE void sum_products(const Task& task) const {
    const MapPointers<T> sums = {{nullptr, this->gradient(task, layout_.branch[1]),
                                  layout_.has(2) ? this->gradient(task, layout_.branch[2]) : nullptr}};
    sum_part(grad_y(task), x(task), layout_, task.planes, task.over0.from(task.part * layout_.plane_padded()),
             task.over1.from(task.part * kPlanesAtOnce * layout_.pitch), sums);
  }

  HE_INLINE void write_grad_x(const Task& task) const {
    Element* const grad_x = static_cast<Element*>(p_.grad_x) + task.sample * layout_.sample_numel();
    write_gradient<true>(grad_y(task), grad_x, layout_, task.planes,
                         GradientTerms<T>{task.gate.pointers(layout_), task.mean_grad.pointers(layout_),
                                          task.max_grad.pointers(layout_), task.max_index.pointers(layout_)});
  }
};

}  // namespace

void triplet_backward_cpu(const TripletBackward& p, SimdLevel level, const ThreadPool& pool) {
  return with_element(p.shape.dtype, [&](auto element) { return Backward<decltype(element)>(p, level, pool).run(); });
}

}  // namespace hashengine
