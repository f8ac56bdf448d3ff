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

at::Tensor fake_quant(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                      int64_t quant_min, int64_t quant_max, int64_t ch_axis, c10::string_view mask,
                      c10::string_view rounding) {
  // A forward-mode tangent goes the same way, where it is refused: it would be dropped silently
  // below.
  if ((at::GradMode::is_enabled() && x.requires_grad()) || x._fw_grad(0).defined())
    return FakeQuantFunction::apply(x, scale, zero_point, quant_min, quant_max, ch_axis,
                                    std::string(mask), std::string(rounding));
  return below_autograd(x, scale, zero_point, quant_min, quant_max, ch_axis, mask, rounding);
}

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
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
