#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "bindings/arguments.h"
#include "rule_table.h"

// Gradients. Forward and backward are ops of their own, so that a traced graph contains both. The
// fake-quants without a learned parameter save one bit per element for the backward.
namespace torch_ext::bindings {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor backward_op(const at::Tensor& grad, const at::Tensor& mask) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("torch_ext::_fake_quant_backward", "")
                                 .typed<decltype(backward_op)>();
  return handle.call(grad, mask);
}

// Forward mode is not implemented. A tensor with a tangent goes to Function::apply, which raises:
// below autograd the tangent would be dropped without a word.
bool differentiates(const at::Tensor& t) {
  return (at::GradMode::is_enabled() && t.requires_grad()) || t._fw_grad(0).defined();
}

// Autograd kernel of an op whose only gradient is that of its first argument x, [shape of x]. Where
// x has none, Op runs; else ForwardOp, which also returns the packed mask of the elements whose
// gradient passes. kExtra: what ForwardOp takes after the arguments of Op.
template <class Op, class ForwardOp, class Signature, auto... kExtra>
struct MaskFunction;
template <class Op, class ForwardOp, class... Types, auto... kExtra>
struct MaskFunction<Op, ForwardOp, at::Tensor(const at::Tensor&, Types...), kExtra...>
    : torch::autograd::Function<
          MaskFunction<Op, ForwardOp, at::Tensor(const at::Tensor&, Types...), kExtra...>> {
  static constexpr bool is_traceable = true;

  static at::Tensor call(const at::Tensor& x, Types... others) {
    if (differentiates(x)) return MaskFunction::apply(x, others...);
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_op<Op>(x, others...);
  }

  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, Types... others) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, mask] = call_op<ForwardOp>(x, others..., kExtra...);
    context->save_for_backward({mask});
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list gradients(1 + sizeof...(Types));
    if (grads[0].defined()) gradients[0] = backward_op(grads[0], context->get_saved_variables()[0]);
    return gradients;
  }
};

using FakeQuantFunction = MaskFunction<FakeQuantOp, FakeQuantForwardOp, FakeQuantOp::Signature>;
constexpr bool kWithMask = true;
using FollowFakeQuantFunction =
    MaskFunction<FollowFakeQuantOp, FollowForwardOp, FollowFakeQuantOp::Signature, kWithMask>;

at::Tensor learned_below(const LearnedArguments& a) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_op<LearnedOp>(a.x, a.method, a.parameter, a.zero_point, a.quant_min, a.quant_max,
                            a.ch_axis, a.use_grad_scaling, a.batch_axis);
}

struct LearnedFunction : torch::autograd::Function<LearnedFunction> {
  static constexpr bool is_traceable = true;

  // The tensors are passed beside `a`, which holds them too: autograd finds its inputs among the
  // arguments.
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& parameter,
                            const std::optional<at::Tensor>& zero_point,
                            const LearnedArguments& a) {
    context->save_for_backward({x, parameter, zero_point.value_or(at::Tensor())});
    context->saved_data["method"] = std::string(a.method);
    context->saved_data["quant_min"] = a.quant_min;
    context->saved_data["quant_max"] = a.quant_max;
    context->saved_data["ch_axis"] = a.ch_axis;
    context->saved_data["use_grad_scaling"] = a.use_grad_scaling;
    context->saved_data["batch_axis"] = a.batch_axis;
    return learned_below(a);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list gradients(4);  // of x, parameter, zero_point, a
    if (!grads[0].defined()) return gradients;
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& zero_point = saved[2];
    auto& data = context->saved_data;
    auto [dx, dparameter, dzero_point] = call_op<LearnedBackwardOp>(
        grads[0], saved[0], data["method"].toStringView(), saved[1],
        zero_point.defined() ? std::optional<at::Tensor>(zero_point) : std::nullopt,
        data["quant_min"].toInt(), data["quant_max"].toInt(), data["ch_axis"].toInt(),
        data["use_grad_scaling"].toBool(), data["batch_axis"].toInt());
    gradients[0] = dx;
    gradients[1] = dparameter;
    // A fixed zero point holds integers, and has no gradient.
    if (zero_point.defined() && zero_point.is_floating_point()) gradients[2] = dzero_point;
    return gradients;
  }
};

at::Tensor learned_fake_quant(const LearnedArguments& a) {
  if (differentiates(a.x) || differentiates(a.parameter) ||
      (a.zero_point && differentiates(*a.zero_point)))
    return LearnedFunction::apply(a.x, a.parameter, a.zero_point, a);
  return learned_below(a);
}

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  impl<LearnedOp, learned_fake_quant>(m);
  m.impl(LearnedBackwardOp::name, torch::autograd::autogradNotImplementedFallback());
  m.impl(FollowFakeQuantOp::name, TORCH_FN(FollowFakeQuantFunction::call));
  m.impl(FollowForwardOp::name, torch::autograd::autogradNotImplementedFallback());
  m.impl(FakeQuantOp::name, TORCH_FN(FakeQuantFunction::call));
  m.impl(FakeQuantForwardOp::name, torch::autograd::autogradNotImplementedFallback());
  m.impl("_fake_quant_backward", torch::autograd::autogradNotImplementedFallback());
  // Not differentiable: statistics, ranges and qparams are constants of a training step.
  for (const char* op :
       {"observe_", "merge_", "follow_", "solve", "solve_many", "qparams", "kl_threshold"})
    m.impl(op, torch::CppFunction::makeFallthrough());
  for (const RuleRow& rule : rules()) m.impl(rule.name, torch::CppFunction::makeFallthrough());
}

}  // namespace
}  // namespace torch_ext::bindings
