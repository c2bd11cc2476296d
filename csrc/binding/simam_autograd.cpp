#include "autograd.h"

namespace hashengine::binding {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor>;

Outputs simam_below_autograd(const at::Tensor& x, double lam) {
  static const auto op = find_op<Outputs(const at::Tensor&, double)>("simam");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, lam);
}

struct Simam : torch::autograd::Function<Simam> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, double lam) {
    auto [y, stats] = simam_below_autograd(x, lam);
    ctx->save_for_backward({x, stats});
    ctx->saved_data["lam"] = lam;
    ctx->mark_non_differentiable({stats});
    ctx->set_materialize_grads(false);
    return {y, stats};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, double)>("simam_backward");
    if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
    const variable_list saved = ctx->get_saved_variables();
    const FinalBackward guard;
    return {op.call(grads[0], saved[0], saved[1], ctx->saved_data["lam"].toDouble()), at::Tensor()};
  }
};

Outputs simam(const at::Tensor& x, double lam) {
  if (!needs_gradient(x)) return simam_below_autograd(x, lam);
  const variable_list outputs = Simam::apply(x, lam);
  return {outputs[0], outputs[1]};
}

HE_AUTOGRAD("simam", simam)

}  // namespace
}  // namespace hashengine::binding
