#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/round.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/arguments.h"
#include "bindings/backend.h"
#include "bindings/contracts.h"
#include "bindings/layout.h"
#include "rule_table.h"

// Fake-quants with a learned parameter: one op for all methods, and an op of each method's name.
namespace torch_ext::bindings {
namespace {

struct Checked {
  int32_t method;
  core::DType dtype;
  at::Tensor parameter, zero_point;  // zero point int32, undefined: all 0
  bool learns_zero_point;
  int64_t ch_axis;
  core::Codes codes;
  double elements;  // per parameter, for its gradient scale; 0: no scaling

  const int32_t* zero_points() const {
    return zero_point.defined() ? zero_point.const_data_ptr<int32_t>() : nullptr;
  }
};

at::Tensor forward_of(const char* op, const Checked& l, const at::Tensor& x) {
  at::Tensor out = empty_in(order_of(x), x);
  const at::Tensor data = with_strides_of(out, x);
  core::FakeQuantJob job{data.const_data_ptr(),
                         out.mutable_data_ptr(),
                         nullptr,
                         channel_layout(out, l.ch_axis),
                         l.parameter.const_data_ptr<float>(),
                         l.zero_points(),
                         l.codes,
                         core::Rounding::half_even,
                         core::Mask::rounded,
                         l.method};
  Backend(op, x).fake_quant_forward(l.dtype, job);
  return out;
}

struct Gradients {
  at::Tensor dx, parameter, zero_point, mixed;
};

Gradients backward_of(const char* op, const Checked& l, const LearnedBackwardArguments& a) {
  const at::Tensor& x = a.forward.x;
  // Without memory where it is not wanted.
  at::Tensor dx = empty_in(order_of(x), a.of_x ? x : x.to(at::kMeta));
  const at::Tensor data = with_strides_of(dx, x), upstream = with_strides_of(dx, a.grad);
  const auto per_channel = [&](bool used) {
    if (!a.of_parameters) return at::empty({0}, l.parameter.options());
    return used ? at::empty(l.parameter.sizes(), l.parameter.options())
                : at::zeros(l.parameter.sizes(), l.parameter.options());
  };
  Gradients gradients{a.of_x ? dx : at::empty({0}, x.options()), per_channel(true),
                      per_channel(l.learns_zero_point), per_channel(l.learns_zero_point)};
  const bool learns_zero_point = a.of_parameters && l.learns_zero_point;
  const core::LearnedJob job{
      l.method,
      data.const_data_ptr(),
      upstream.const_data_ptr(),
      a.of_x ? dx.mutable_data_ptr() : nullptr,
      channel_layout(dx, l.ch_axis),
      l.parameter.const_data_ptr<float>(),
      l.zero_points(),
      l.codes,
      l.elements,
      a.of_parameters ? gradients.parameter.mutable_data_ptr<float>() : nullptr,
      learns_zero_point ? gradients.zero_point.mutable_data_ptr<float>() : nullptr,
      learns_zero_point ? gradients.mixed.mutable_data_ptr<float>() : nullptr};
  Backend(op, x).learned_backward(l.dtype, job);
  return gradients;
}

at::Tensor tangent_of(const char* op, const Checked& l, const LearnedTangentArguments& t) {
  const at::Tensor& x = t.forward.x;
  const auto values = [](const std::optional<at::Tensor>& given) {
    return given ? given->const_data_ptr<float>() : nullptr;
  };
  at::Tensor out = empty_in(order_of(x), x);
  const at::Tensor data = with_strides_of(out, x);
  const at::Tensor x_tangent = t.x_tangent ? with_strides_of(out, *t.x_tangent) : at::Tensor();
  const core::TangentJob job{l.method,
                             data.const_data_ptr(),
                             x_tangent.defined() ? x_tangent.const_data_ptr() : nullptr,
                             out.mutable_data_ptr(),
                             channel_layout(out, l.ch_axis),
                             l.parameter.const_data_ptr<float>(),
                             l.zero_points(),
                             l.codes,
                             l.elements,
                             values(t.parameter_tangent),
                             values(t.zero_point_tangent),
                             values(t.mixed_tangent)};
  Backend(op, x).learned_tangent(l.dtype, job);
  return out;
}

Checked prepared(const LearnedContract& contract, const LearnedArguments& a) {
  const core::Codes& codes = contract.codes;
  // A learned zero point is used as the engines will use it: rounded, and on the grid.
  const at::Tensor whole =
      contract.learns_zero_point
          ? a.zero_point->round().clamp_(codes.quant_min, codes.quant_max).to(at::kInt)
          : a.zero_point.value_or(at::Tensor());
  double elements = 0;
  if (a.use_grad_scaling && a.x.numel() > 0) {
    elements = static_cast<double>(a.x.numel() / a.parameter.numel());
    if (a.batch_axis >= 0 && a.x.dim() > 0) elements /= static_cast<double>(a.x.size(a.batch_axis));
  }
  return {contract.row.learned,       contract.dtype, a.parameter, whole,
          contract.learns_zero_point, a.ch_axis,      codes,       elements};
}

at::Tensor learned_fake_quant(const LearnedArguments& a) {
  const LearnedContract contract = check_learned(a);
  return forward_of(contract.row.name, prepared(contract, a), a.x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const LearnedBackwardArguments& a) {
  const LearnedContract contract = check_learned(a);
  Gradients g = backward_of(contract.row.name, prepared(contract, a.forward), a);
  return {std::move(g.dx), std::move(g.parameter), std::move(g.zero_point), std::move(g.mixed)};
}

at::Tensor tangent(const LearnedTangentArguments& a) {
  const LearnedContract contract = check_learned(a);
  return tangent_of(contract.row.name, prepared(contract, a.forward), a);
}

void register_ops(torch::Library& m) {
  impl<LearnedOp, learned_fake_quant>(m);
  impl<LearnedBackwardOp, backward>(m);
  impl<LearnedTangentOp, tangent>(m);
}

// Boxed kernel of the op that has the method's name. Its arguments are those of method_schema() in
// schema.cpp; the rest is learned_fake_quant.
void by_name(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string name = op.schema().name().substr(sizeof("torch_ext::") - 1);
  const FakeQuantRow& row = check_method(name);
  std::vector<c10::IValue> given = torch::jit::pop(*stack, op.schema().arguments().size());
  auto next = given.begin();
  const at::Tensor x = (next++)->toTensor(), parameter = (next++)->toTensor();
  std::optional<at::Tensor> zero_point;
  if (row.per_channel) zero_point = (next++)->toTensor();
  const c10::string_view grid = (next++)->toStringView();
  int64_t ch_axis = -1, batch_axis = -1;
  bool use_grad_scaling = true;
  if (row.per_channel) {
    ch_axis = (next++)->toInt();
    use_grad_scaling = (next++)->toBool();
    batch_axis = (next++)->toInt();
  }
  torch::jit::push(*stack, call_learned<LearnedOp>({x, row.name, parameter, zero_point, grid,
                                                    ch_axis, use_grad_scaling, batch_axis}));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  for (const FakeQuantRow& row : fake_quants())
    if (row.learned >= 0) m.impl(row.name, torch::CppFunction::makeFromBoxedFunction<&by_name>());
}

}  // namespace torch_ext::bindings
