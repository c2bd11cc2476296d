#include "hashengine/simam.h"
#include "sanitized.h"

using namespace hashengine;

extern "C" void emulation_set_capability(int capability);

namespace {

void run_one(const ElementType& type, SimamShape shape, int64_t offset) {
  shape.dtype = type.dtype;
  const int64_t planes = shape.samples * shape.channels;
  const int64_t bytes = planes * shape.positions * type.size;
  Array x(bytes, offset * type.size, 0x3c), grad_y(bytes, offset * type.size, 0x3c), y(bytes, offset * type.size);
  Array grad_x(bytes, offset * type.size), stats(planes * 2 * (type.size == 8 ? 8 : 4), 0);
  Array forward_workspace(simam_forward_workspace_bytes(shape), 0);
  Array backward_workspace(simam_backward_workspace_bytes(shape), 0);
  launch_simam_forward({x.get(), y.get(), stats.get(), shape, 0.1}, forward_workspace.get(), nullptr);
  launch_simam_backward({grad_y.get(), x.get(), stats.get(), grad_x.get(), shape, 0.1}, backward_workspace.get(),
                        nullptr);
}

// Planes of 1, 49 and 64 positions fit in a warp. They are loaded directly if they are of float64, or aligned and of
// whole vectors; otherwise they are staged in shared memory. Planes of 2,056 positions fit in a block (float64: in a
// cluster). Planes of 17,001 positions (loaded one element at a time) and of 17,008 positions (loaded as vectors) fit
// in a cluster on compute capability 9.0 and are split on 8.0; those of float64 are always split. The slabs of 1,100
// positions also fit in a cluster on 9.0 and are split on 8.0. The rows of the last slab extend beyond the last channel
// in every case but one: 24 channels of float64 on 9.0.
// SimamShape: samples, channels, positions, layout, dtype.
const Sanitized simam("simam", [] {
  constexpr auto kPlanes = FeatureLayout::kContiguous;
  constexpr auto kSlabs = FeatureLayout::kChannelsLast;
  for (const auto& type : kFloatingTypes) {
    for (int64_t offset : {0, 1}) {
      for (int64_t positions : {1, 49, 64, 2056}) run_one(type, {2, 3, positions, kPlanes, type.dtype}, offset);
      for (int64_t channels : {3, 40}) run_one(type, {2, channels, 50, kSlabs, type.dtype}, offset);
    }
    for (int capability : {90, 80}) {
      emulation_set_capability(capability);
      run_one(type, {1, 1, 17001, kPlanes, type.dtype}, 0);
      run_one(type, {1, 1, 17008, kPlanes, type.dtype}, 0);
      run_one(type, {1, 24, 1100, kSlabs, type.dtype}, 0);
    }
    emulation_set_capability(90);
  }
});

}  // namespace
