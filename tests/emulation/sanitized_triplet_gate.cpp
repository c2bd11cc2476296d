#include "hashengine/triplet_gate.h"
#include "sanitized.h"

using namespace hashengine;

extern "C" void emulation_set_multiprocessors(int count);

namespace {

void run_one(const TripletShape& shape, int64_t element_bytes, int64_t offset) {
  const int64_t real_bytes = shape.dtype == Dtype::kFloat64 ? 8 : 4;
  const int64_t bytes = shape.samples * shape.channels * shape.height * shape.width * element_bytes;
  const auto map_bytes = [&](int branch) { return shape.map_numel(branch) * real_bytes; };
  Array x(bytes, offset * element_bytes, 0x3c), grad_y(bytes, offset * element_bytes, 0x3c);
  Array y(bytes, offset * element_bytes), grad_x(bytes, offset * element_bytes);
  Array maps[] = {{map_bytes(0), 0, 0x3c}, {map_bytes(1), 0, 0x3c}, {map_bytes(2), 0, 0x3c}};
  Array grad_maps[] = {{map_bytes(0), 0}, {map_bytes(1), 0}, {map_bytes(2), 0}};
  Array workspace(triplet_gate_backward_workspace_bytes(shape), 0);

  TripletGateForward forward{x.get(), {}, y.get(), shape};
  TripletGateBackward backward{grad_y.get(), x.get(), {}, grad_x.get(), {}, shape};
  for (int branch = 0; branch < shape.branches; ++branch) {
    backward.map[branch] = forward.map[branch] = maps[branch].get();
    backward.grad_map[branch] = grad_maps[branch].get();
  }
  launch_triplet_gate_forward(forward, nullptr);
  launch_triplet_gate_backward(backward, workspace.get(), nullptr);
}

// TripletShape: samples, channels, height, width, branches, kernel_size, layout, dtype. Then element_bytes and offset.
const Sanitized triplet_gate("triplet_gate", [] {
  constexpr auto kContiguous = FeatureLayout::kContiguous, kChannelsLast = FeatureLayout::kChannelsLast;
  emulation_set_multiprocessors(132);                                   // as an H200 has
  run_one({2, 3, 5, 7, 3, 1, kContiguous, Dtype::kFloat32}, 4, 0);      // rows accessed one element at a time
  run_one({1, 8, 3, 16, 2, 1, kChannelsLast, Dtype::kBFloat16}, 2, 0);  // rows in 16-byte vectors
  run_one({1, 17, 2, 8, 3, 1, kContiguous, Dtype::kFloat16}, 2, 1);     // arrays that are not aligned
  run_one({1, 2, 16, 136, 3, 1, kContiguous, Dtype::kFloat16}, 2, 0);   // long rows, each cut into several tiles
  run_one({1, 2, 3, 4, 3, 1, kChannelsLast, Dtype::kFloat64}, 8, 0);    // float64
});

}  // namespace
