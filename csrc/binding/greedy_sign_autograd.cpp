#include "autograd.h"

namespace hashengine::binding {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

Outputs greedy_sign_below_autograd(const at::Tensor& u, double alpha) {
  static const auto op = find_op<Outputs(const at::Tensor&, double)>("greedy_sign");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(u, alpha);
}

struct GreedySign : torch::autograd::Function<GreedySign> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& u, double alpha) {
    ctx->save_for_backward({u});
    ctx->saved_data["alpha"] = alpha;
    ctx->set_materialize_grads(false);
    auto [b, penalty] = greedy_sign_below_autograd(u, alpha);
    return {b, penalty};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find_op<at::Tensor(const OptionalTensor&, const OptionalTensor&, const at::Tensor&, double)>(
            "greedy_sign_backward");
    const auto used = [](const at::Tensor& grad) { return grad.defined() ? OptionalTensor(grad) : std::nullopt; };
    if (!grads[0].defined() && !grads[1].defined()) return {at::Tensor(), at::Tensor()};
    const at::Tensor u = ctx->get_saved_variables()[0];
    const FinalBackward guard;
    return {op.call(used(grads[0]), used(grads[1]), u, ctx->saved_data["alpha"].toDouble()), at::Tensor()};
  }
};

Outputs greedy_sign(const at::Tensor& u, double alpha) {
  if (!needs_gradient(u)) return greedy_sign_below_autograd(u, alpha);
  const variable_list outputs = GreedySign::apply(u, alpha);
  return {outputs[0], outputs[1]};
}

HE_AUTOGRAD("greedy_sign", greedy_sign)

}  // namespace
}  // namespace hashengine::binding
