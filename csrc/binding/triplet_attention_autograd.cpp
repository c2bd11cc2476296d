#include "autograd.h"

namespace hashengine::binding {
namespace {

using at::Tensor;
using at::TensorList;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs triplet_below_autograd(const Tensor& x, TensorList conv_weight, TensorList bn_weight, TensorList bn_bias,
                               TensorList running_mean, TensorList running_var, bool training, double eps) {
  static const auto op = find_op<Outputs(const Tensor&, TensorList, TensorList, TensorList, TensorList, TensorList,
                                         bool, double)>("triplet_attention");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps);
}

struct TripletAttention : torch::autograd::Function<TripletAttention> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, TensorList conv_weight, TensorList bn_weight,
                               TensorList bn_bias, TensorList running_mean, TensorList running_var, bool training,
                               double eps) {
    const auto [y, mean, var, pooled, index, response] =
        triplet_below_autograd(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps);
    variable_list saved{x, mean, var, pooled, index, response};
    for (const TensorList parameters : {conv_weight, bn_weight, bn_bias})
      saved.insert(saved.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->mark_non_differentiable({mean, var, pooled, index, response});
    ctx->set_materialize_grads(false);
    return {y, mean, var, pooled, index, response};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find_op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
            const Tensor&, const Tensor&, TensorList, TensorList, TensorList, const Tensor&, const Tensor&,
            const Tensor&, const Tensor&, const Tensor&, bool, double)>("triplet_attention_backward");
    const variable_list saved = ctx->get_saved_variables();
    const size_t branches = (saved.size() - kMaps) / 3;
    // x, three lists of parameters, two lists of running statistics, training, eps
    variable_list results(1 + 5 * branches + 2);
    if (!grads[0].defined()) return results;
    const FinalBackward guard;
    const TensorList parameters = TensorList(saved).slice(kMaps);
    const auto list = [&](size_t i) { return parameters.slice(i * branches, branches); };
    const auto [grad_x, grad_conv_weight, grad_bn_weight, grad_bn_bias] =
        op.call(grads[0], saved[0], list(0), list(1), list(2), saved[1], saved[2], saved[3], saved[4], saved[5],
                ctx->saved_data["training"].toBool(), ctx->saved_data["eps"].toDouble());
    results[0] = grad_x;
    const Tensor* gradients[] = {&grad_conv_weight, &grad_bn_weight, &grad_bn_bias};
    for (size_t i = 0; i < parameters.size(); ++i) {
      const Tensor gradient = gradients[i / branches]->select(0, int64_t(i % branches));
      results[1 + i] = gradient.view_symint(parameters[i].sym_sizes()).to(parameters[i].scalar_type());
    }
    return results;
  }

 private:
  static constexpr size_t kMaps = 6;  // x and what the forward returns beside y
};

Outputs triplet_attention(const Tensor& x, TensorList conv_weight, TensorList bn_weight, TensorList bn_bias,
                          TensorList running_mean, TensorList running_var, bool training, double eps) {
  bool is_needed = needs_gradient(x);
  for (const TensorList parameters : {conv_weight, bn_weight, bn_bias})
    for (const Tensor& parameter : parameters) is_needed |= needs_gradient(parameter);
  if (!is_needed)
    return triplet_below_autograd(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps);
  const variable_list out =
      TripletAttention::apply(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

HE_AUTOGRAD("triplet_attention", triplet_attention)

}  // namespace
}  // namespace hashengine::binding
