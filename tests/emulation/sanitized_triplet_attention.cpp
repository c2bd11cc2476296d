#include "hashengine/triplet_attention.h"
#include "sanitized.h"

using namespace hashengine;

extern "C" void emulation_set_capability(int capability);
extern "C" void emulation_set_multiprocessors(int count);

namespace {

void run_one(const TripletShape& shape, int64_t element_bytes, int64_t offset) {
  const int64_t real_bytes = shape.dtype == Dtype::kFloat64 ? 8 : 4, map_bytes = shape.maps_numel() * real_bytes;
  const int64_t bytes = shape.samples * shape.channels * shape.height * shape.width * element_bytes;
  const int64_t weight_bytes = 2 * shape.kernel_size * shape.kernel_size * real_bytes;
  Array x(bytes, offset * element_bytes, 0x3c), y(bytes, offset * element_bytes), grad_x(bytes, offset * element_bytes);
  Array conv_weight(weight_bytes, 0, 0x3c), one(real_bytes, 0, 0x3c);
  Array pooled(2 * map_bytes, 0), index(shape.maps_numel() * 4, 0), response(map_bytes, 0);
  Array mean(shape.branches * real_bytes, 0), var(shape.branches * real_bytes, 0);
  Array grad_conv_weight(shape.branches * weight_bytes, 0), grad_bn_weight(shape.branches * real_bytes, 0);
  Array grad_bn_bias(shape.branches * real_bytes, 0);
  Array forward_workspace(triplet_forward_workspace_bytes(shape), 0);
  Array backward_workspace(triplet_backward_workspace_bytes(shape), 0);

  TripletForward forward{x.get(), y.get(), {{}, {}, {}, 1e-5}, {}, {}, {}, true, shape};
  TripletInference inference{x.get(), y.get(), {}, {}, {}, shape};
  for (int branch = 0; branch < shape.branches; ++branch) {
    forward.parameters.conv_weight[branch] = conv_weight.get();
    forward.parameters.bn_weight[branch] = forward.parameters.bn_bias[branch] = one.get();
    forward.running_mean[branch] = inference.running_mean[branch] = one.get();
    forward.running_var[branch] = inference.running_var[branch] = one.get();
  }
  forward.saved = {pooled.get(), index.get<int32_t>(), response.get(), mean.get(), var.get()};
  inference.parameters = forward.parameters;
  launch_triplet_forward(forward, forward_workspace.get(), nullptr);
  launch_triplet_backward({y.get(), x.get(), forward.parameters, forward.saved, grad_x.get(), grad_conv_weight.get(),
                           grad_bn_weight.get(), grad_bn_bias.get(), true, shape},
                          backward_workspace.get(), nullptr);
  for (int capability : {90, 80}) {  // 90: one launch with clusters if there is a ClusterPlan; 80: three launches
    emulation_set_capability(capability);
    Array workspace(triplet_inference_workspace_bytes(shape), 0);
    launch_triplet_inference(inference, workspace.get(), nullptr);
  }
  emulation_set_capability(90);
}

// TripletShape: samples, channels, height, width, branches, kernel_size, layout, dtype. Then element_bytes and offset.
const Sanitized triplet_attention("triplet_attention", [] {
  emulation_set_multiprocessors(132);  // as an H200 has
  constexpr auto kContiguous = FeatureLayout::kContiguous, kChannelsLast = FeatureLayout::kChannelsLast;
  run_one({2, 3, 5, 7, 3, 7, kContiguous, Dtype::kFloat32}, 4, 0);      // rows accessed one element at a time
  run_one({1, 8, 3, 16, 2, 3, kChannelsLast, Dtype::kBFloat16}, 2, 0);  // rows in 16-byte vectors
  run_one({1, 17, 2, 8, 3, 1, kContiguous, Dtype::kFloat16}, 2, 1);     // arrays that are not aligned
  run_one({1, 2, 16, 136, 3, 7, kContiguous, Dtype::kFloat16}, 2, 0);   // long rows, each cut into several tiles
  run_one({1, 2, 3, 4, 3, 7, kChannelsLast, Dtype::kFloat64}, 8, 0);    // float64
  run_one({1, 33, 5, 6, 3, 7, kContiguous, Dtype::kBFloat16}, 2, 0);    // clusters of four blocks
});

}  // namespace
