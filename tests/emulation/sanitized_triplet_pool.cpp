#include "hashengine/triplet_pool.h"
#include "sanitized.h"

using namespace hashengine;

extern "C" void emulation_set_multiprocessors(int count);

namespace {

void run_one(const TripletShape& shape, int64_t element_bytes, int64_t offset) {
  const int64_t real_bytes = shape.dtype == Dtype::kFloat64 ? 8 : 4;
  const int64_t bytes = shape.samples * shape.channels * shape.height * shape.width * element_bytes;
  const auto pool_bytes = [&](int branch) { return 2 * shape.map_numel(branch) * real_bytes; };
  const auto index_bytes = [&](int branch) { return shape.map_numel(branch) * int64_t(sizeof(int32_t)); };
  Array x(bytes, offset * element_bytes, 0x3c), grad_x(bytes, offset * element_bytes);
  Array pools[] = {{pool_bytes(0), 0}, {pool_bytes(1), 0}, {pool_bytes(2), 0}};
  Array indices[] = {{index_bytes(0), 0}, {index_bytes(1), 0}, {index_bytes(2), 0}};
  Array workspace(triplet_pool_forward_workspace_bytes(shape), 0);

  TripletPoolForward forward{x.get(), {}, {}, shape};
  TripletPoolBackward backward{{}, {}, grad_x.get(), shape};
  for (int branch = 0; branch < kTripletBranches; ++branch) {
    backward.grad_pool[branch] = forward.pool[branch] = pools[branch].get();
    backward.index[branch] = forward.index[branch] = indices[branch].get<int32_t>();
  }
  launch_triplet_pool_forward(forward, workspace.get(), nullptr);
  launch_triplet_pool_backward(backward, nullptr);
}

// TripletShape: samples, channels, height, width, branches, kernel_size, layout, dtype. Then element_bytes and offset.
const Sanitized triplet_pool("triplet_pool", [] {
  constexpr auto kContiguous = FeatureLayout::kContiguous, kChannelsLast = FeatureLayout::kChannelsLast;
  emulation_set_multiprocessors(132);                                   // as an H200 has
  run_one({2, 3, 5, 7, 3, 1, kContiguous, Dtype::kFloat32}, 4, 0);      // rows accessed one element at a time
  run_one({1, 8, 3, 16, 3, 1, kChannelsLast, Dtype::kBFloat16}, 2, 0);  // rows in 16-byte vectors
  run_one({1, 17, 2, 8, 3, 1, kContiguous, Dtype::kFloat16}, 2, 1);     // arrays that are not aligned
  run_one({1, 2, 16, 136, 3, 1, kContiguous, Dtype::kFloat16}, 2, 0);   // long rows, each cut into several tiles
  run_one({1, 2, 3, 4, 3, 1, kChannelsLast, Dtype::kFloat64}, 8, 0);    // float64
});

}  // namespace
