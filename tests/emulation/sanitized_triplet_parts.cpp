#include "hashengine/triplet_gate.h"
#include "hashengine/triplet_pool.h"
#include "sanitized.h"

using namespace hashengine;

namespace {

void run_one(const TripletShape& shape, int64_t size, int64_t offset) {
  const int64_t real = shape.dtype == Dtype::kFloat64 ? 8 : 4;
  const int64_t bytes = shape.samples * shape.channels * shape.height * shape.width * size;
  const auto map_bytes = [&](int branch) { return shape.map_numel(branch) * real; };
  const auto index_bytes = [&](int branch) { return shape.map_numel(branch) * int64_t(sizeof(int32_t)); };
  Array x(bytes, offset * size, 0x3c), y(bytes, offset * size), grad_x(bytes, offset * size);
  Array pools[] = {{2 * map_bytes(0), 0}, {2 * map_bytes(1), 0}, {2 * map_bytes(2), 0}};
  Array indices[] = {{index_bytes(0), 0}, {index_bytes(1), 0}, {index_bytes(2), 0}};
  Array maps[] = {{map_bytes(0), 0, 0x3c}, {map_bytes(1), 0, 0x3c}, {map_bytes(2), 0, 0x3c}};
  Array grad_maps[] = {{map_bytes(0), 0}, {map_bytes(1), 0}, {map_bytes(2), 0}};
  Array pool_workspace(triplet_pool_forward_workspace_bytes(shape), 0);
  Array gate_workspace(triplet_gate_backward_workspace_bytes(shape), 0);

  TripletPoolForward pool{x.get(), {}, {}, shape};
  TripletPoolBackward pool_backward{{}, {}, grad_x.get(), shape};
  TripletGateForward gate{x.get(), {}, y.get(), shape};
  TripletGateBackward gate_backward{y.get(), x.get(), {}, grad_x.get(), {}, shape};
  for (int branch = 0; branch < kTripletBranches; ++branch) {
    pool_backward.grad_pool[branch] = pool.pool[branch] = pools[branch].get();
    pool_backward.index[branch] = pool.index[branch] = indices[branch].get<int32_t>();
    if (branch >= shape.branches) continue;
    gate_backward.map[branch] = gate.map[branch] = maps[branch].get();
    gate_backward.grad_map[branch] = grad_maps[branch].get();
  }
  if (shape.branches == kTripletBranches) {
    launch_triplet_pool_forward(pool, pool_workspace.get(), nullptr);
    launch_triplet_pool_backward(pool_backward, nullptr);
  }
  launch_triplet_gate_forward(gate, nullptr);
  launch_triplet_gate_backward(gate_backward, gate_workspace.get(), nullptr);
}

const Sanitized triplet_parts("triplet_parts", [] {
  constexpr auto kContiguous = FeatureLayout::kContiguous, kChannelsLast = FeatureLayout::kChannelsLast;
  run_one({2, 3, 5, 7, 3, 1, kContiguous, Dtype::kFloat32}, 4, 0);
  run_one({1, 8, 3, 16, 2, 1, kChannelsLast, Dtype::kBFloat16}, 2, 0);
  run_one({1, 17, 2, 8, 3, 1, kContiguous, Dtype::kFloat16}, 2, 1);
  run_one({1, 2, 16, 136, 3, 1, kContiguous, Dtype::kFloat16}, 2, 0);
  run_one({1, 2, 3, 4, 3, 1, kChannelsLast, Dtype::kFloat64}, 8, 0);
});

}  // namespace
