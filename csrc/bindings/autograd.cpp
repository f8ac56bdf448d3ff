#include "bindings/autograd.h"

#include <torch/library.h>

#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "bindings/layout.h"
#include "rule_table.h"

// Gradients of the fake-quants that save one bit per element, and registration. Forward and
// backward are ops of their own, so that a traced graph contains both.
namespace torch_ext::bindings {
namespace {

at::Tensor masked(const at::Tensor& grad, const at::Tensor& mask, at::IntArrayRef order,
                  bool by_last_axis) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("torch_ext::_fake_quant_backward", "")
                                 .typed<decltype(masked)>();
  return handle.call(grad, mask, order, by_last_axis);
}

struct Masked {
  static constexpr bool is_traceable = true;

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) return {at::Tensor()};
    return {masked(grads[0], context->get_saved_variables()[0],
                   context->saved_data["order"].toIntVector(),
                   context->saved_data["by_last_axis"].toBool())};
  }
};

// Gives `out` the derivative of the straight-through map x * mask. That is linear and symmetric:
// the same op is its backward, its forward derivative, and the derivative of either.
void differentiate(const at::Tensor& out, const at::Tensor& x, const at::Tensor& mask,
                   at::IntArrayRef order, bool by_last_axis) {
  record<Masked>({x}, {out}, [&](AutogradContext& context) {
    context.save_for_backward({mask});
    context.saved_data["order"] = order.vec();
    context.saved_data["by_last_axis"] = by_last_axis;
  });
  if (const at::Tensor tangent = tangent_of(x); tangent.defined())
    set_tangent(out, masked(tangent, mask, order, by_last_axis));
}

at::Tensor masked_autograd(const at::Tensor& grad, const at::Tensor& mask, at::IntArrayRef order,
                           bool by_last_axis) {
  const at::Tensor out = [&] {
    const at::AutoDispatchBelowAutograd below;
    return masked(grad, mask, order, by_last_axis);
  }();
  differentiate(out, grad, mask, order, by_last_axis);
  return out;
}

// torch's own fake-quant refuses such a scale too. The buffers that follow_fake_quant writes to are
// checked as every op's are.
template <class Op, class... Others>
void check_constants(const at::Tensor& first, const Others&...) {
  if constexpr (std::is_same_v<typename Op::Arguments, FakeQuantArguments>)
    expect(!differentiates(first), "fake_quant", "scale", "a constant",
           "one that requires a gradient; detach it, or learn it with lsq");
}

// Dynamic scales are taken as constants, too.
template <class Op, class... Others>
void check_constants(int64_t, c10::string_view, const std::optional<at::Tensor>& tensor_scale,
                     const Others&...) {
  expect(!tensor_scale || !differentiates(*tensor_scale), "dynamic_fake_quant", "tensor_scale",
         "a constant", "one that requires a gradient; detach it");
}

// Autograd kernel of an op whose only gradient is that of its first argument x, [shape of x]. Where
// x has none, Op runs; else ForwardOp, which also returns the packed mask of the elements whose
// gradient passes. kExtra: what ForwardOp takes after the arguments of Op.
template <class Op, class ForwardOp, class Signature, auto... kExtra>
struct Quantizing;
template <class Op, class ForwardOp, class... Types, auto... kExtra>
struct Quantizing<Op, ForwardOp, at::Tensor(const at::Tensor&, Types...), kExtra...> {
  static at::Tensor call(const at::Tensor& x, Types... others) {
    check_constants<Op>(others...);
    // The order goes to forward and backward alike, because strides may change in between: a
    // compiler chooses others, and vmap calls ForwardOp with slices.
    if (differentiates(x)) {
      const std::vector<int64_t> order = order_of(x);
      return std::get<0>(call_op<ForwardOp>(x, others..., kExtra..., at::IntArrayRef(order)));
    }
    const at::AutoDispatchBelowAutograd below;
    return call_op<Op>(x, others...);
  }
};
using FakeQuantAutograd = Quantizing<FakeQuantOp, FakeQuantForwardOp, FakeQuantOp::Signature>;
constexpr bool kWithMask = true;
using FollowFakeQuantAutograd =
    Quantizing<FollowFakeQuantOp, FollowForwardOp, FollowFakeQuantOp::Signature, kWithMask>;
using DynamicAutograd = Quantizing<DynamicOp, DynamicForwardOp, DynamicOp::Signature>;

// Autograd kernel of an op that returns its output and the packed mask. Its last argument is the
// order of memory.
template <class Op, class Signature = typename Op::Signature>
struct WithMask;
template <class Op, class... Types>
struct WithMask<Op, std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, Types...)> {
  static std::tuple<at::Tensor, at::Tensor> call(const at::Tensor& x, Types... others) {
    check_constants<Op>(others...);
    auto results = [&] {
      const at::AutoDispatchBelowAutograd below;
      return call_op<Op>(x, others...);
    }();
    const at::IntArrayRef order = std::get<sizeof...(Types) - 1>(std::tie(others...));
    constexpr bool kByLastAxis = std::is_same_v<typename Op::Arguments, DynamicArguments>;
    differentiate(std::get<0>(results), x, std::get<1>(results), order, kByLastAxis);
    return results;
  }
};

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  register_learned_autograd(m);
  m.impl(FakeQuantOp::name, TORCH_FN(FakeQuantAutograd::call));
  m.impl(FakeQuantForwardOp::name, TORCH_FN(WithMask<FakeQuantForwardOp>::call));
  m.impl(DynamicOp::name, TORCH_FN(DynamicAutograd::call));
  m.impl(DynamicForwardOp::name, TORCH_FN(WithMask<DynamicForwardOp>::call));
  m.impl(FollowFakeQuantOp::name, TORCH_FN(FollowFakeQuantAutograd::call));
  m.impl(FollowForwardOp::name, TORCH_FN(WithMask<FollowForwardOp>::call));
  m.impl("_fake_quant_backward", TORCH_FN(masked_autograd));
  // Not differentiable: statistics, ranges and qparams are constants of a training step.
  for (const char* op :
       {"observe_", "merge_", "follow_", "solve", "solve_many", "qparams", "kl_threshold", "gptq"})
    m.impl(op, torch::CppFunction::makeFallthrough());
  for (const RuleRow& rule : rules()) m.impl(rule.name, torch::CppFunction::makeFallthrough());
}

}  // namespace
}  // namespace torch_ext::bindings
