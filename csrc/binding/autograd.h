// What the autograd kernels share. They take the place of the formulas that hashengine/ops registers from Python, which
// say the same, and cost a fifth of their time a call: on small feature maps the call is what a layer costs.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>

namespace hashengine::binding {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// An op as the dispatcher has it; keep it in a static, since the search takes a lock and a hash of the name.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("hashengine::" + std::string(name)).c_str(), "").typed<Signature>();
}

template <typename... Tensors>
bool needs_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

// In a backward of which no gradient is asked: the backward op's own autograd kernel, which is Python and refuses to be
// differentiated, is passed by.
class FinalBackward {
 public:
  FinalBackward() {
    if (!at::GradMode::is_enabled()) guard_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};

}  // namespace hashengine::binding

// Under the keys of the devices that have kernels, where it goes before what Python registered for all devices.
#define HE_AUTOGRAD(op, kernel)                                                            \
  TORCH_LIBRARY_IMPL(hashengine, AutogradCPU, library) { library.impl(op, kernel); } \
  TORCH_LIBRARY_IMPL(hashengine, AutogradCUDA, library) { library.impl(op, kernel); }
