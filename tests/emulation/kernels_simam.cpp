#include "hashengine/simam.h"

using namespace hashengine;

namespace {

SimamShape shape_of(int64_t samples, int64_t channels, int64_t positions, bool channels_last, int dtype) {
  return {samples, channels, positions, channels_last ? FeatureLayout::kChannelsLast : FeatureLayout::kContiguous,
          Dtype(dtype)};
}

}  // namespace

extern "C" {

int64_t workspace_bytes_of_simam(int64_t samples, int64_t channels, int64_t positions, bool channels_last, int dtype) {
  return simam_forward_workspace_bytes(shape_of(samples, channels, positions, channels_last, dtype));
}

int64_t workspace_bytes_of_simam_backward(int64_t samples, int64_t channels, int64_t positions, bool channels_last,
                                          int dtype) {
  return simam_backward_workspace_bytes(shape_of(samples, channels, positions, channels_last, dtype));
}

void simam_forward(const void* x, void* y, void* stats, int64_t samples, int64_t channels, int64_t positions,
                   bool channels_last, int dtype, double lam, void* workspace) {
  launch_simam_forward({x, y, stats, shape_of(samples, channels, positions, channels_last, dtype), lam}, workspace,
                       nullptr);
}

void simam_backward(const void* grad_y, const void* x, const void* stats, void* grad_x, int64_t samples,
                    int64_t channels, int64_t positions, bool channels_last, int dtype, double lam, void* workspace) {
  launch_simam_backward({grad_y, x, stats, grad_x, shape_of(samples, channels, positions, channels_last, dtype), lam},
                        workspace, nullptr);
}

}  // extern "C"
