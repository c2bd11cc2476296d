#include "hashengine/greedy_sign.h"
#include "sanitized.h"

using namespace hashengine;

namespace {

void run_one(Dtype dtype, int64_t size, int64_t numel, int64_t offset) {
  const int64_t bytes = numel * size;
  Array u(bytes, offset * size, 0x3c), b(bytes, offset * size), grad_u(bytes, 0), penalty(8, 0), grad_penalty(8, 0, 0);
  Array workspace(greedy_sign_workspace_bytes(numel), 0);
  launch_greedy_sign_forward({u.get(), b.get(), penalty.get(), numel, 0.1, dtype}, workspace.get(), nullptr);
  launch_greedy_sign_backward({b.get(), grad_penalty.get(), u.get(), grad_u.get(), numel, 0.1, dtype}, nullptr);
  launch_greedy_sign_backward({nullptr, grad_penalty.get(), u.get(), grad_u.get(), numel, 0.1, dtype}, nullptr);
  launch_greedy_sign_backward({b.get(), nullptr, u.get(), grad_u.get(), numel, 0.1, dtype}, nullptr);
}

// 33 elements are processed one by one in one block, 520 as vectors in one block (if they are aligned), and 20,481 one
// by one in several blocks.
const Sanitized greedy_sign("greedy_sign", [] {
  for (const auto& type : kFloatingTypes)
    for (int64_t offset : {0, 1})
      for (int64_t numel : {0, 1, 33, 520, 20481}) run_one(type.dtype, type.size, numel, offset);
});

}  // namespace
