// triplet_attention on the CPU, backward.
//
// Two passes over feature maps: the first sums grad_y * x over each axis (the gradients of the gates), the second
// writes grad_x (both triplet_gate.h); between them sigmoid, BatchNorm and convolution are undone on the small maps.
// Moved: 4 numel s, the floor, and 24 bytes a value of the maps (pooled, index, response read; the gates' gradients
// written and read). Of BatchNorm's batch statistics two sums over the batch must be known before a response's gradient
// is, hence two rounds over the samples.
//
// Tasks and the order of sums are as in the forward.

#include <vector>

#include "hashengine/triplet_attention.h"
#include "triplet_conv.h"
#include "triplet_maps.h"
#include "triplet_norm.h"

namespace hashengine {
namespace {

// What happens to the maps, whatever the elements of x.
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
        gradients_((layout_.samples * layout_.padded_numel + kLanes) * int64_t(sizeof(T))),  // vectors are read whole
        affine_sums_(size_t(layout_.samples * layout_.parts * kTripletBranches)),
        weight_sums_(size_t(layout_.samples * layout_.parts * layout_.branches * 2 * taps_)) {
    for (int b = 0; b < layout_.branches; ++b) {
      const T mean = static_cast<const T*>(p.saved.mean)[b], var = static_cast<const T*>(p.saved.var)[b];
      norm_[b] = {triplet_norm(p.parameters, b, mean, var)};
      turn_weights(b);
    }
  }

  // A share of a sample, and its scratch memory.
  struct Task {
    Task(const BackwardMaps& backward, int64_t sample, int64_t part, std::byte* memory)
        : Task(backward, backward.layout_, sample, part, Scratch(memory)) {}
    Task(const BackwardMaps& backward, const TripletLayout& layout, int64_t sample, int64_t part, Scratch scratch)
        : sample(sample),
          part(part),
          planes(layout.share(layout.length[0], 1, part)),
          over0(scratch, layout.parts * layout.plane_padded()),
          over1(scratch, layout.parts * kPlanesAtOnce * layout.pitch),
          pooled_strip(scratch.take<T>(layout.parts * backward.strip_sizes_.strip)),
          gradient_strip(scratch.take<T>(layout.parts * backward.strip_sizes_.strip)),
          gate(layout, scratch),
          even(layout, scratch),
          peak(layout, scratch),
          index(layout, scratch),
          maps(layout, backward.p_.saved, sample),
          bytes(scratch.used()) {}

    int64_t sample;
    int64_t part;
    Range planes;
    SumRows<T> over0;
    SumRows<T> over1;
    T* pooled_strip;
    T* gradient_strip;
    AxisMaps<T> gate;
    AxisMaps<T> even;
    AxisMaps<T> peak;
    AxisMaps<LaneIndex<T>> index;
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

  // First the sums of grad_y * x, then the gradient of BatchNorm's result: padded.
  T* gradient(const Task& task, int b) const {
    return reinterpret_cast<T*>(gradients_.get()) + task.sample * layout_.padded_numel + layout_.map[b].padded_offset;
  }
  size_t task_index(const Task& task) const { return size_t(task.sample * layout_.parts + task.part); }

  void merge_parts(int64_t sample, int64_t part, std::byte* memory) const {
    phase([this](const Task& task) HE_INLINE_LAMBDA { merge(task); })(sample, part, memory);
  }
  void undo_gates(int64_t sample, int64_t part, std::byte* memory) {
    phase([this](const Task& task) HE_INLINE_LAMBDA { undo_gate(task); })(sample, part, memory);
  }
  void undo_convolutions(int64_t sample, int64_t part, std::byte* memory) {
    phase([this](const Task& task) HE_INLINE_LAMBDA { undo_convolution(task); })(sample, part, memory);
  }
  void spread_maps(int64_t sample, int64_t part, std::byte* memory) const {
    phase([this](const Task& task) HE_INLINE_LAMBDA { spread(task); })(sample, part, memory);
  }

  HE_INLINE void merge(const Task& task) const {
    if (!layout_.has(0)) return;
    finish_sums(layout_, layout_.share(layout_.length[1], kLanes, task.part), task.over0,
                gradient(task, layout_.branch[0]), layout_.map_of(0).pitch());
  }

  HE_INLINE void undo_gate(const Task& task) {
    for (int b = 0; b < layout_.branches; ++b) {
      const TripletMap map = layout_.map[b];
      affine_sums_[task_index(task) * kTripletBranches + size_t(b)] =
          affine_rows(gradient(task, b), task.maps.branch[b].response, map, layout_.share(map.rows, kLanes, task.part),
                      norm_[b].norm, T(1) / T(layout_.branches));
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

  HE_INLINE void undo_convolution(const Task& task) {
    for (int b = 0; b < layout_.branches; ++b) {
      switch (p_.shape.kernel_size) {
        case 7: undo_branch<7, 7>(task, b); break;
        case 3: undo_branch<3, 3>(task, b); break;
        default: undo_branch<0, 1>(task, b);
      }
    }
  }

  template <int kKernel, int kTaps>
  HE_INLINE void undo_branch(const Task& task, int b) {
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
    const T* const weight = turned_weight_[b].data();
    const Range share = tiles.share(layout_.parts, task.part);
    for (int64_t number = share.begin; number < share.end; ++number) {
      const Tile tile = tiles[number];
      pooled.prepare(tile);
      gradient_strip.prepare(tile);
      for (int plane = 0; plane < 2; ++plane)
        fill_strip(pooled, plane, map, tile, [&](int64_t row, int64_t column, auto part) HE_INLINE_LAMBDA {
          return load(maps.pooled + plane * map.numel() + row * map.columns + column, part);
        });
      fill_strip(gradient_strip, 0, map, tile, [&](int64_t row, int64_t column, auto part) HE_INLINE_LAMBDA {
        return norm(load(gradients + row * pitch + column), load(maps.response + row * map.columns + column, part));
      });
      add_weight_gradient<kTaps>(pooled, 2, gradient_strip, kernel_size, tile, weight_sums);
      for (int plane = 0; plane < 2; ++plane) {
        const AxisMaps<T>& to = plane == 0 ? task.peak : task.even;
        convolve_strip<kKernel>(gradient_strip, 1, weight + plane * taps_, kernel_size, tile,
                                to.branch(layout_, b) + tile.rows.begin * pitch + tile.columns.begin, pitch);
      }
    }
  }

  HE_INLINE void spread(const Task& task) const {
    for (int b = 0; b < layout_.branches; ++b) {
      const TripletMap map = layout_.map[b];
      const BranchMaps<T> maps = task.maps.branch[b];
      const Range rows = layout_.share(map.rows, kLanes, task.part);
      gate_rows(maps.response, map, rows, norm_[b].norm, T(1) / T(layout_.branches), task.gate.branch(layout_, b));
      pad_index_rows<T>(maps.index, map, rows, task.index.branch(layout_, b));
    }
    task.gate.spread(layout_, task.part);
    task.even.spread(layout_, task.part);
    task.peak.spread(layout_, task.part);
    task.index.spread(layout_, task.part);
  }

  // The gradient of a correlation's input is one with the kernel turned around; the mean's is shared out at once.
  void turn_weights(int b) {
    const auto* weight = static_cast<const T*>(p_.parameters.conv_weight[b]);
    turned_weight_[b].resize(size_t(2 * taps_));
    for (int64_t i = 0; i < taps_; ++i) {
      turned_weight_[b][size_t(i)] = weight[taps_ - 1 - i];
      turned_weight_[b][size_t(taps_ + i)] = weight[2 * taps_ - 1 - i] / T(layout_.map[b].pooled_length);
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
  const int64_t taps_;  // of one plane's kernel
  const StripSizes strip_sizes_;
  const SimdLevel level_;
  const ThreadPool& pool_;
  ScratchBlock gradients_;
  std::vector<AffineSums> affine_sums_;
  std::vector<double> weight_sums_;
  NormBackward<T> norm_[kTripletBranches] = {};
  std::vector<T> turned_weight_[kTripletBranches];
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
    const auto undoing_gates = [this](auto... task) { this->undo_gates(task...); };
    const auto undoing_convolutions = [this](auto... task) { this->undo_convolutions(task...); };
    const auto spreading = [this](auto... task) { this->spread_maps(task...); };
    const auto routing = this->phase([this](const Task& task) HE_INLINE_LAMBDA { route_gradient(task); });
    const int64_t bytes = Task(*this, 0, 0, nullptr).bytes;
    run_phases(pool_, layout_, bytes, false, summing, merging, undoing_gates);
    this->add_affine_gradients();
    run_phases(pool_, layout_, bytes, true, undoing_convolutions, spreading, routing);
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
    const OverAxes<T> sums = {{nullptr, this->gradient(task, layout_.branch[1]),
                               layout_.has(2) ? this->gradient(task, layout_.branch[2]) : nullptr}};
    sum_part(grad_y(task), x(task), layout_, task.planes, task.over0.from(task.part * layout_.plane_padded()),
             task.over1.from(task.part * kPlanesAtOnce * layout_.pitch), sums);
  }

  HE_INLINE void route_gradient(const Task& task) const {
    Element* const grad_x = static_cast<Element*>(p_.grad_x) + task.sample * layout_.sample_numel();
    route_part<true>(grad_y(task), grad_x, layout_, task.planes,
                     Routing<T>{task.gate.over_axes(layout_), task.even.over_axes(layout_),
                                task.peak.over_axes(layout_), task.index.over_axes(layout_)});
  }
};

}  // namespace

void triplet_backward_cpu(const TripletBackward& p, SimdLevel level, const ThreadPool& pool) {
  return with_element(p.shape.dtype, [&](auto element) { return Backward<decltype(element)>(p, level, pool).run(); });
}

}  // namespace hashengine
