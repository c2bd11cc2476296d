// C++ autograd formulas of the ops that a model calls in each step of training or inference. On the CPU and on CUDA
// they replace the formulas that hashengine/ops registers from Python, and compute the same gradients. A call of a C++
// formula takes less time than a call of a Python formula. This matters for small feature maps, where the calls are
// most of the cost of a layer. All formulas are in one file because torch's autograd header takes long to compile.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

namespace hashengine::binding {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

// The dispatcher's handle of an op. Callers keep it in a static variable because the lookup takes a lock and hashes the
// name.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  const std::string qualified_name = std::string("hashengine::") + name;
  return c10::Dispatcher::singleton().findSchemaOrThrow(qualified_name.c_str(), "").typed<Signature>();
}

// Refuses tangents of forward-mode differentiation, which the ops would drop.
void check_tangents(const char* op, const Tensor& x, std::initializer_list<TensorList> parameters) {
  bool has_tangent = x.defined() && x._fw_grad(0).defined();
  for (const TensorList tensors : parameters)
    for (const Tensor& tensor : tensors) has_tangent |= tensor._fw_grad(0).defined();
  TORCH_CHECK_VALUE(!has_tangent, op,
                    ": inputs must be without tangents of forward-mode differentiation, got some; call the function in "
                    "hashengine.ops inside the transform, where it computes in plain torch; if it was compiled outside "
                    "the transform, call torch.compiler.reset() first");
}

// Whether an autograd formula is needed. Refuses tangents.
bool needs_gradient(const char* op, const Tensor& x, std::initializer_list<TensorList> parameters = {}) {
  check_tangents(op, x, parameters);
  if (!at::GradMode::is_enabled()) return false;
  bool is_needed = x.defined() && x.requires_grad();
  for (const TensorList tensors : parameters)
    for (const Tensor& tensor : tensors) is_needed |= tensor.requires_grad();
  return is_needed;
}

// Refuses running statistics that require a gradient, which the formulas would not compute.
void check_statistics(const char* op, TensorList running_mean, TensorList running_var) {
  if (!at::GradMode::is_enabled()) return;
  bool is_needed = false;
  for (const TensorList tensors : {running_mean, running_var})
    for (const Tensor& tensor : tensors) is_needed |= tensor.requires_grad();
  TORCH_CHECK_VALUE(!is_needed, op,
                    ": running statistics must be without a gradient, got some that require one; detach them");
}

// Skips the autograd kernel of a backward op, refuse_derivatives() below, in a backward that nothing differentiates: it
// runs without create_graph, and its gradients have no tangents, neither of forward-mode differentiation nor of
// torch.func.
class SkipAutogradInLastBackward {
 public:
  explicit SkipAutogradInLastBackward(std::initializer_list<Tensor> gradients) {
    bool has_tangent = false;
    for (const Tensor& gradient : gradients)
      has_tangent |= gradient.defined() &&
                     (gradient._fw_grad(0).defined() || gradient.key_set().has(c10::DispatchKey::FuncTorchGradWrapper));
    if (!at::GradMode::is_enabled() && !has_tangent) guard_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};

// --- simam ---

using SimamOutputs = std::tuple<Tensor, Tensor>;

SimamOutputs simam_below_autograd(const Tensor& x, double lam) {
  static const auto op = find_op<SimamOutputs(const Tensor&, double)>("simam");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, lam);
}

// Results without a derivative leave forward() through a pointer: compiled autograd refuses a Function that marks its
// results as non-differentiable.
struct Simam : torch::autograd::Function<Simam> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, double lam, Tensor* stats) {
    Tensor y;
    std::tie(y, *stats) = simam_below_autograd(x, lam);
    ctx->save_for_backward({x, *stats});
    ctx->saved_data["lam"] = lam;
    ctx->set_materialize_grads(false);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, double)>("simam_backward");
    variable_list results(3);
    if (!grads[0].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    const SkipAutogradInLastBackward guard({grads[0]});
    results[0] = op.call(grads[0], saved[0], saved[1], ctx->saved_data["lam"].toDouble());
    return results;
  }
};

SimamOutputs simam(const Tensor& x, double lam) {
  if (!needs_gradient("simam", x)) return simam_below_autograd(x, lam);
  Tensor stats;
  const Tensor y = Simam::apply(x, lam, &stats);
  return {y, stats};
}

// --- greedy_sign ---

using GreedySignOutputs = std::tuple<Tensor, Tensor>;

GreedySignOutputs greedy_sign_below_autograd(const Tensor& u, double alpha) {
  static const auto op = find_op<GreedySignOutputs(const Tensor&, double)>("greedy_sign");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(u, alpha);
}

struct GreedySign : torch::autograd::Function<GreedySign> {
  static variable_list forward(AutogradContext* ctx, const Tensor& u, double alpha) {
    ctx->save_for_backward({u});
    ctx->saved_data["alpha"] = alpha;
    ctx->set_materialize_grads(false);
    auto [b, penalty] = greedy_sign_below_autograd(u, alpha);
    return {b, penalty};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find_op<Tensor(const OptionalTensor&, const OptionalTensor&, const Tensor&, double)>("greedy_sign_backward");
    const auto optional = [](const Tensor& grad) { return grad.defined() ? OptionalTensor(grad) : std::nullopt; };
    if (!grads[0].defined() && !grads[1].defined()) return {Tensor(), Tensor()};
    const Tensor u = ctx->get_saved_variables()[0];
    const SkipAutogradInLastBackward guard({grads[0], grads[1]});
    return {op.call(optional(grads[0]), optional(grads[1]), u, ctx->saved_data["alpha"].toDouble()), Tensor()};
  }
};

GreedySignOutputs greedy_sign(const Tensor& u, double alpha) {
  if (!needs_gradient("greedy_sign", u)) return greedy_sign_below_autograd(u, alpha);
  const variable_list outputs = GreedySign::apply(u, alpha);
  return {outputs[0], outputs[1]};
}

// --- triplet_attention ---

// y, mean, var, pooled, index, response.
using TripletOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

TripletOutputs triplet_below_autograd(const Tensor& x, TensorList conv_weight, TensorList bn_weight, TensorList bn_bias,
                                      TensorList running_mean, TensorList running_var, bool training, double eps) {
  static const auto op =
      find_op<TripletOutputs(const Tensor&, TensorList, TensorList, TensorList, TensorList, TensorList, bool, double)>(
          "triplet_attention");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps);
}

// The gradients of y with respect to x, to the lists of convolution weights, BatchNorm weights and BatchNorm biases,
// which are the three parts of `parameters`, and to two lists of running statistics. The lists have one gradient per
// branch.
variable_list triplet_gradients(const Tensor& grad_y, const Tensor& x, TensorList parameters, const Tensor& mean,
                                const Tensor& var, const Tensor& pooled, const Tensor& index, const Tensor& response,
                                bool training, double eps) {
  static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, TensorList, TensorList, TensorList, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, bool, double)>("triplet_attention_backward");
  const size_t branches = parameters.size() / 3;
  const auto list = [&](size_t i) { return parameters.slice(i * branches, branches); };
  variable_list results(1 + 5 * branches);
  const SkipAutogradInLastBackward guard({grad_y});
  const auto [grad_x, grad_conv_weight, grad_bn_weight, grad_bn_bias] =
      op.call(grad_y, x, list(0), list(1), list(2), mean, var, pooled, index, response, training, eps);
  results[0] = grad_x;
  const Tensor* gradients[] = {&grad_conv_weight, &grad_bn_weight, &grad_bn_bias};
  for (size_t i = 0; i < parameters.size(); i += branches) {
    // One conversion for all branches, if their parameters have the dtype of the first; the other one does nothing.
    const Tensor of_list = gradients[i / branches]->to(parameters[i].scalar_type());
    for (size_t branch = 0; branch < branches; ++branch) {
      const Tensor& parameter = parameters[i + branch];
      const bool is_like_first = parameter.scalar_type() == parameters[i].scalar_type();
      const Tensor gradient = (is_like_first ? of_list : *gradients[i / branches]).select(0, int64_t(branch));
      results[1 + i + branch] = gradient.view_symint(parameter.sym_sizes()).to(parameter.scalar_type());
    }
  }
  return results;
}

struct TripletAttention : torch::autograd::Function<TripletAttention> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, TensorList conv_weight, TensorList bn_weight,
                        TensorList bn_bias, TensorList running_mean, TensorList running_var, bool training, double eps,
                        TripletOutputs* outputs) {
    *outputs = triplet_below_autograd(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps);
    const auto& [y, mean, var, pooled, index, response] = *outputs;
    variable_list saved{x, mean, var, pooled, index, response};
    for (const TensorList parameters : {conv_weight, bn_weight, bn_bias})
      saved.insert(saved.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->set_materialize_grads(false);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kSavedBeforeParameters = 6;  // x, and all results of the forward except y
    const variable_list saved = ctx->get_saved_variables();
    const TensorList parameters = TensorList(saved).slice(kSavedBeforeParameters);
    variable_list results;
    if (grads[0].defined())
      results = triplet_gradients(grads[0], saved[0], parameters, saved[1], saved[2], saved[3], saved[4], saved[5],
                                  ctx->saved_data["training"].toBool(), ctx->saved_data["eps"].toDouble());
    // One result per input of forward(), in the order of the inputs; a list has one per branch.
    results.resize(1 + 5 * parameters.size() / 3 + 3);
    return results;
  }
};

TripletOutputs triplet_attention(const Tensor& x, TensorList conv_weight, TensorList bn_weight, TensorList bn_bias,
                                 TensorList running_mean, TensorList running_var, bool training, double eps) {
  check_statistics("triplet_attention", running_mean, running_var);
  if (!needs_gradient("triplet_attention", x, {conv_weight, bn_weight, bn_bias}))
    return triplet_below_autograd(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps);
  TripletOutputs outputs;
  std::get<0>(outputs) =
      TripletAttention::apply(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps, &outputs);
  return outputs;
}

// --- triplet_attention_inference ---

Tensor inference_below_autograd(const Tensor& x, TensorList conv_weight, TensorList bn_weight, TensorList bn_bias,
                                TensorList running_mean, TensorList running_var, double eps) {
  static const auto op =
      find_op<Tensor(const Tensor&, TensorList, TensorList, TensorList, TensorList, TensorList, double)>(
          "triplet_attention_inference");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, eps);
}

// The backward computes what it needs from the inputs, because the forward keeps nothing.
struct TripletInference : torch::autograd::Function<TripletInference> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, TensorList conv_weight, TensorList bn_weight,
                        TensorList bn_bias, TensorList running_mean, TensorList running_var, double eps) {
    variable_list saved{x};
    for (const TensorList list : {conv_weight, bn_weight, bn_bias, running_mean, running_var})
      saved.insert(saved.end(), list.begin(), list.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["eps"] = eps;
    ctx->set_materialize_grads(false);
    return inference_below_autograd(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const TensorList lists = TensorList(saved).slice(1);
    const size_t branches = lists.size() / 5;
    const auto list = [&](size_t i) { return lists.slice(i * branches, branches); };
    const double eps = ctx->saved_data["eps"].toDouble();
    variable_list results;
    if (grads[0].defined()) {
      const auto [y, mean, var, pooled, index, response] =
          triplet_below_autograd(saved[0], list(0), list(1), list(2), list(3), list(4), false, eps);
      results = triplet_gradients(grads[0], saved[0], lists.slice(0, 3 * branches), mean, var, pooled, index, response,
                                  false, eps);
    }
    results.resize(1 + lists.size() + 1);
    return results;
  }
};

Tensor triplet_attention_inference(const Tensor& x, TensorList conv_weight, TensorList bn_weight, TensorList bn_bias,
                                   TensorList running_mean, TensorList running_var, double eps) {
  check_statistics("triplet_attention_inference", running_mean, running_var);
  if (!needs_gradient("triplet_attention_inference", x, {conv_weight, bn_weight, bn_bias}))
    return inference_below_autograd(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, eps);
  return TripletInference::apply(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, eps);
}

// --- backward ops, which have no derivatives ---

// Calls visit(tensor) for each tensor in the value: a tensor, a list of tensors, or neither.
template <typename Visit>
void for_each_tensor(const c10::IValue& value, Visit visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& tensor : value.toTensorVector()) visit(tensor);
  }
}

// Puts results of an op into the graph, with a backward that refuses.
struct RefuseDerivative : torch::autograd::Function<RefuseDerivative> {
  static variable_list forward(AutogradContext* ctx, TensorList, const variable_list* results, const std::string& op) {
    ctx->saved_data["op"] = op;
    return *results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK_VALUE(false, ctx->saved_data["op"].toStringRef(),
                      ": inputs must be detached from the graph, got a backward through this op; it has no derivative "
                      "(double backward is not supported)");
  }
};

std::string name_of(const c10::OperatorHandle& handle) {
  return handle.operator_name().name.substr(sizeof("hashengine::") - 1);
}

// The tensors among the arguments of an op, which are the last values of the stack.
variable_list tensors_of(const c10::OperatorHandle& handle, const torch::jit::Stack& stack) {
  variable_list tensors;
  for (const c10::IValue& value : torch::jit::last(stack, handle.schema().arguments().size()))
    for_each_tensor(value, [&](const Tensor& tensor) { tensors.push_back(tensor); });
  return tensors;
}

// The kernel, below autograd, of ops whose formula is in Python. That formula drops tangents.
void refuse_tangents(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  check_tangents(name_of(handle).c_str(), Tensor(), {tensors_of(handle, *stack)});
  const at::AutoDispatchBelowADInplaceOrView guard;
  handle.callBoxed(*stack);
}

// The autograd kernel of every backward op: refuses tangents, which the op would drop, and puts a node into the graph
// that refuses a second derivative.
void refuse_derivatives(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const std::string op = name_of(handle);
  const variable_list inputs = tensors_of(handle, *stack);
  variable_list results;
  const bool is_needed = needs_gradient(op.c_str(), Tensor(), {inputs});
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    handle.callBoxed(*stack);
  }
  if (!is_needed) return;
  const size_t count = handle.schema().returns().size();
  for (const c10::IValue& value : torch::jit::last(*stack, count)) results.push_back(value.toTensor());
  torch::jit::drop(*stack, count);
  for (const Tensor& result : RefuseDerivative::apply(TensorList(inputs), &results, op)) stack->emplace_back(result);
}

void register_formulas_of_forwards(torch::Library& library) {
  library.impl("simam", simam);
  library.impl("greedy_sign", greedy_sign);
  library.impl("triplet_attention", triplet_attention);
  library.impl("triplet_attention_inference", triplet_attention_inference);
}

// The formulas are registered under AutogradCPU and AutogradCUDA. These keys take precedence over the key Autograd,
// under which Python registers its formulas for all devices.
void register_formulas(torch::Library& library) {
  register_formulas_of_forwards(library);
  for (const char* op : {"simam_backward", "simam_energy_backward", "greedy_sign_backward",
                         "triplet_attention_backward", "triplet_pool_backward", "triplet_gate_backward"})
    library.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_derivatives>());
}

TORCH_LIBRARY_IMPL(hashengine, AutogradCPU, library) { register_formulas(library); }
TORCH_LIBRARY_IMPL(hashengine, AutogradCUDA, library) { register_formulas(library); }

// Below autograd, for the formulas in Python: those of the ops without one here, and of all ops on other devices. They
// call this key without gradients, so the functions of the forwards only refuse tangents there.
TORCH_LIBRARY_IMPL(hashengine, ADInplaceOrView, library) {
  register_formulas_of_forwards(library);
  for (const char* op :
       {"simam_energy", "triplet_pool", "triplet_gate", "simam_backward", "simam_energy_backward",
        "greedy_sign_backward", "triplet_attention_backward", "triplet_pool_backward", "triplet_gate_backward"})
    library.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_tangents>());
}

}  // namespace
}  // namespace hashengine::binding
