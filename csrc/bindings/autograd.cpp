#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "rule_table.h"

// Gradients. Forward and backward are ops of their own, so that a traced graph sees both; what is
// kept between them is one bit per element.
namespace torch_ext::bindings {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor below_autograd(const at::Tensor& x, const at::Tensor& scale,
                          const at::Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                          int64_t ch_axis, c10::string_view mask, c10::string_view rounding) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::fake_quant", "")
                             .typed<decltype(below_autograd)>();
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, scale, zero_point, quant_min, quant_max, ch_axis, mask, rounding);
}

std::tuple<at::Tensor, at::Tensor> forward_op(const at::Tensor& x, const at::Tensor& scale,
                                              const at::Tensor& zero_point, int64_t quant_min,
                                              int64_t quant_max, int64_t ch_axis,
                                              c10::string_view mask, c10::string_view rounding) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::_fake_quant_forward", "")
                             .typed<decltype(forward_op)>();
  return op.call(x, scale, zero_point, quant_min, quant_max, ch_axis, mask, rounding);
}

at::Tensor backward_op(const at::Tensor& grad, const at::Tensor& mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::_fake_quant_backward", "")
                             .typed<decltype(backward_op)>();
  return op.call(grad, mask);
}

struct FakeQuantFunction : torch::autograd::Function<FakeQuantFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& scale,
                            const at::Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                            int64_t ch_axis, const std::string& mask, const std::string& rounding) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, bits] =
        forward_op(x, scale, zero_point, quant_min, quant_max, ch_axis, mask, rounding);
    context->save_for_backward({bits});
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    at::Tensor dx;
    if (grads[0].defined()) dx = backward_op(grads[0], context->get_saved_variables()[0]);
    return {dx, {}, {}, {}, {}, {}, {}, {}};
  }
};

// A forward-mode tangent counts too: it goes where it is refused, and would be dropped silently
// below.
bool differentiates(const at::Tensor& t) {
  return (at::GradMode::is_enabled() && t.requires_grad()) || t._fw_grad(0).defined();
}

at::Tensor fake_quant(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                      int64_t quant_min, int64_t quant_max, int64_t ch_axis, c10::string_view mask,
                      c10::string_view rounding) {
  if (differentiates(x))
    return FakeQuantFunction::apply(x, scale, zero_point, quant_min, quant_max, ch_axis,
                                    std::string(mask), std::string(rounding));
  return below_autograd(x, scale, zero_point, quant_min, quant_max, ch_axis, mask, rounding);
}

at::Tensor follow_below_autograd(const at::Tensor& x, const at::Tensor& range,
                                 const at::Tensor& scale, const at::Tensor& zero_point,
                                 const at::Tensor& solved, double averaging_constant,
                                 c10::string_view rule, int64_t quant_min, int64_t quant_max,
                                 bool symmetric, c10::string_view scale_rule, bool power_of_two,
                                 at::ArrayRef<double> options, int64_t ch_axis,
                                 int64_t mantissa_bits, int64_t octaves, c10::string_view mask,
                                 c10::string_view rounding) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::follow_fake_quant", "")
                             .typed<decltype(follow_below_autograd)>();
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, range, scale, zero_point, solved, averaging_constant, rule, quant_min,
                 quant_max, symmetric, scale_rule, power_of_two, options, ch_axis, mantissa_bits,
                 octaves, mask, rounding);
}

std::tuple<at::Tensor, at::Tensor> follow_forward_op(
    const at::Tensor& x, const at::Tensor& range, const at::Tensor& scale,
    const at::Tensor& zero_point, const at::Tensor& solved, double averaging_constant,
    c10::string_view rule, int64_t quant_min, int64_t quant_max, bool symmetric,
    c10::string_view scale_rule, bool power_of_two, at::ArrayRef<double> options, int64_t ch_axis,
    int64_t mantissa_bits, int64_t octaves, c10::string_view mask, c10::string_view rounding,
    bool with_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::_follow_fake_quant_forward", "")
                             .typed<decltype(follow_forward_op)>();
  return op.call(x, range, scale, zero_point, solved, averaging_constant, rule, quant_min,
                 quant_max, symmetric, scale_rule, power_of_two, options, ch_axis, mantissa_bits,
                 octaves, mask, rounding, with_mask);
}

struct FollowFakeQuantFunction : torch::autograd::Function<FollowFakeQuantFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& range,
                            const at::Tensor& scale, const at::Tensor& zero_point,
                            const at::Tensor& solved, double averaging_constant,
                            const std::string& rule, int64_t quant_min, int64_t quant_max,
                            bool symmetric, const std::string& scale_rule, bool power_of_two,
                            const std::vector<double>& options, int64_t ch_axis,
                            int64_t mantissa_bits, int64_t octaves, const std::string& mask,
                            const std::string& rounding) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, bits] =
        follow_forward_op(x, range, scale, zero_point, solved, averaging_constant, rule, quant_min,
                          quant_max, symmetric, scale_rule, power_of_two, options, ch_axis,
                          mantissa_bits, octaves, mask, rounding, true);
    context->save_for_backward({bits});
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    constexpr size_t kArguments = 18;
    variable_list gradients(kArguments);
    if (grads[0].defined()) gradients[0] = backward_op(grads[0], context->get_saved_variables()[0]);
    return gradients;
  }
};

at::Tensor follow_fake_quant(const at::Tensor& x, const at::Tensor& range, const at::Tensor& scale,
                             const at::Tensor& zero_point, const at::Tensor& solved,
                             double averaging_constant, c10::string_view rule, int64_t quant_min,
                             int64_t quant_max, bool symmetric, c10::string_view scale_rule,
                             bool power_of_two, at::ArrayRef<double> options, int64_t ch_axis,
                             int64_t mantissa_bits, int64_t octaves, c10::string_view mask,
                             c10::string_view rounding) {
  if (differentiates(x))
    return FollowFakeQuantFunction::apply(
        x, range, scale, zero_point, solved, averaging_constant, std::string(rule), quant_min,
        quant_max, symmetric, std::string(scale_rule), power_of_two, options.vec(), ch_axis,
        mantissa_bits, octaves, std::string(mask), std::string(rounding));
  return follow_below_autograd(x, range, scale, zero_point, solved, averaging_constant, rule,
                               quant_min, quant_max, symmetric, scale_rule, power_of_two, options,
                               ch_axis, mantissa_bits, octaves, mask, rounding);
}

at::Tensor learned_below(const at::Tensor& x, c10::string_view method, const at::Tensor& parameter,
                         const std::optional<at::Tensor>& zero_point, int64_t quant_min,
                         int64_t quant_max, int64_t ch_axis, bool use_grad_scaling,
                         int64_t batch_axis) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::learned_fake_quant", "")
                             .typed<decltype(learned_below)>();
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, method, parameter, zero_point, quant_min, quant_max, ch_axis, use_grad_scaling,
                 batch_axis);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> learned_backward_op(
    const at::Tensor& grad, const at::Tensor& x, c10::string_view method,
    const at::Tensor& parameter, const std::optional<at::Tensor>& zero_point, int64_t quant_min,
    int64_t quant_max, int64_t ch_axis, bool use_grad_scaling, int64_t batch_axis) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::_learned_fake_quant_backward", "")
                             .typed<decltype(learned_backward_op)>();
  return op.call(grad, x, method, parameter, zero_point, quant_min, quant_max, ch_axis,
                 use_grad_scaling, batch_axis);
}

struct LearnedFunction : torch::autograd::Function<LearnedFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* context, const at::Tensor& x,
                            const std::string& method, const at::Tensor& parameter,
                            const std::optional<at::Tensor>& zero_point, int64_t quant_min,
                            int64_t quant_max, int64_t ch_axis, bool use_grad_scaling,
                            int64_t batch_axis) {
    context->save_for_backward({x, parameter, zero_point.value_or(at::Tensor())});
    context->saved_data["method"] = method;
    context->saved_data["quant_min"] = quant_min;
    context->saved_data["quant_max"] = quant_max;
    context->saved_data["ch_axis"] = ch_axis;
    context->saved_data["use_grad_scaling"] = use_grad_scaling;
    context->saved_data["batch_axis"] = batch_axis;
    return learned_below(x, method, parameter, zero_point, quant_min, quant_max, ch_axis,
                         use_grad_scaling, batch_axis);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    constexpr size_t kArguments = 9;
    variable_list gradients(kArguments);
    if (!grads[0].defined()) return gradients;
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& zero_point = saved[2];
    auto& data = context->saved_data;
    auto [dx, dparameter, dzero_point] = learned_backward_op(
        grads[0], saved[0], data["method"].toStringView(), saved[1],
        zero_point.defined() ? std::optional<at::Tensor>(zero_point) : std::nullopt,
        data["quant_min"].toInt(), data["quant_max"].toInt(), data["ch_axis"].toInt(),
        data["use_grad_scaling"].toBool(), data["batch_axis"].toInt());
    gradients[0] = dx;
    gradients[2] = dparameter;
    if (zero_point.defined() && zero_point.is_floating_point()) gradients[3] = dzero_point;
    return gradients;
  }
};

at::Tensor learned_fake_quant(const at::Tensor& x, c10::string_view method,
                              const at::Tensor& parameter,
                              const std::optional<at::Tensor>& zero_point, int64_t quant_min,
                              int64_t quant_max, int64_t ch_axis, bool use_grad_scaling,
                              int64_t batch_axis) {
  if (differentiates(x) || differentiates(parameter) || (zero_point && differentiates(*zero_point)))
    return LearnedFunction::apply(x, std::string(method), parameter, zero_point, quant_min,
                                  quant_max, ch_axis, use_grad_scaling, batch_axis);
  return learned_below(x, method, parameter, zero_point, quant_min, quant_max, ch_axis,
                       use_grad_scaling, batch_axis);
}

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("learned_fake_quant", TORCH_FN(learned_fake_quant));
  m.impl("_learned_fake_quant_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("follow_fake_quant", TORCH_FN(follow_fake_quant));
  m.impl("_follow_fake_quant_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("fake_quant", TORCH_FN(fake_quant));
  m.impl("_fake_quant_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_fake_quant_backward", torch::autograd::autogradNotImplementedFallback());
  // Nothing to differentiate: statistics, ranges and qparams are constants of a step.
  for (const char* op :
       {"observe_", "merge_", "follow_", "solve", "solve_many", "qparams", "kl_threshold"})
    m.impl(op, torch::CppFunction::makeFallthrough());
  for (const RuleRow& rule : rules()) m.impl(rule.name, torch::CppFunction::makeFallthrough());
}

}  // namespace
}  // namespace torch_ext::bindings
