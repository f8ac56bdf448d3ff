#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/round.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "bindings/arguments.h"
#include "bindings/backend.h"
#include "bindings/checks.h"
#include "rule_table.h"

// Fake-quants with a learned parameter: one op for all methods, and an op of each method's name.
namespace torch_ext::bindings {
namespace {

void check_grid_of(const char* op, int64_t quant_min, int64_t quant_max) {
  expect(quant_min >= -32768 && quant_min <= 0, op, "quant_min", "between -32768 and 0", quant_min);
  expect(quant_max >= 1 && quant_max <= 65535, op, "quant_max", "between 1 and 65535", quant_max);
}

// On CUDA reading the values would wait for the device: there the output becomes NaN instead.
void check_finite(const char* op, const char* argument, const at::Tensor& t) {
  if (!t.is_cpu()) return;
  const float* const values = t.const_data_ptr<float>();
  for (int64_t c = 0; c < t.numel(); ++c)
    expect(std::isfinite(values[c]), op, argument, "finite", values[c], " in channel ", c);
}

struct Checked {
  int32_t method;
  core::DType dtype;
  at::Tensor parameter, zero_point;  // zero point int32, undefined: all 0
  bool learns_zero_point;
  int64_t ch_axis, quant_min, quant_max;
  double elements;  // per parameter, for its gradient scale; 0: no scaling

  const int32_t* zero_points() const {
    return zero_point.defined() ? zero_point.const_data_ptr<int32_t>() : nullptr;
  }
};

at::Tensor forward_of(const char* op, const Checked& l, const at::Tensor& x) {
  const c10::MaybeOwned<at::Tensor> data = x.expect_contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options());
  core::FakeQuantJob job{data->const_data_ptr(),
                         out.mutable_data_ptr(),
                         nullptr,
                         channel_layout(x, l.ch_axis),
                         l.parameter.const_data_ptr<float>(),
                         l.zero_points(),
                         static_cast<int32_t>(l.quant_min),
                         static_cast<int32_t>(l.quant_max),
                         core::Rounding::half_even,
                         core::Mask::rounded,
                         l.method};
  Backend(op, x).fake_quant_forward(l.dtype, job);
  return out;
}

struct Gradients {
  at::Tensor dx, parameter, zero_point;
};

Gradients backward_of(const char* op, const Checked& l, const at::Tensor& grad,
                      const at::Tensor& x) {
  expect(grad.sizes() == x.sizes(), op, "grad", x.sizes(), grad.sizes());
  expect(grad.scalar_type() == x.scalar_type(), op, "grad", x.scalar_type(), grad.scalar_type());
  expect(grad.device() == x.device(), op, "grad", x.device(), grad.device());
  const c10::MaybeOwned<at::Tensor> data = x.expect_contiguous(),
                                    upstream = grad.expect_contiguous();
  Gradients gradients{at::empty(x.sizes(), x.options()),
                      at::empty(l.parameter.sizes(), l.parameter.options()),
                      l.learns_zero_point ? at::empty(l.parameter.sizes(), l.parameter.options())
                                          : at::zeros(l.parameter.sizes(), l.parameter.options())};
  const core::LearnedJob job{
      l.method,
      data->const_data_ptr(),
      upstream->const_data_ptr(),
      gradients.dx.mutable_data_ptr(),
      channel_layout(x, l.ch_axis),
      l.parameter.const_data_ptr<float>(),
      l.zero_points(),
      static_cast<int32_t>(l.quant_min),
      static_cast<int32_t>(l.quant_max),
      l.elements,
      gradients.parameter.mutable_data_ptr<float>(),
      l.learns_zero_point ? gradients.zero_point.mutable_data_ptr<float>() : nullptr};
  Backend(op, x).learned_backward(l.dtype, job);
  return gradients;
}

Checked check(const FakeQuantRow& row, const LearnedArguments& a) {
  const char* const op = row.name;
  const core::DType dtype = check_data(op, "x", a.x);
  const int64_t channels = check_axis(op, a.x, a.ch_axis);
  expect(row.per_channel || a.ch_axis == -1, op, "ch_axis", "-1, as there is one parameter",
         a.ch_axis);
  check_per_channel(op, row.parameter, a.parameter, at::kFloat, channels, a.x.device());
  const bool learned = a.zero_point && a.zero_point->scalar_type() == at::kFloat;
  expect(row.per_channel || !a.zero_point, op, "zero_point",
         "None, as the method has no zero point", "a tensor");
  if (a.zero_point)
    check_per_channel(op, "zero_point", *a.zero_point, learned ? at::kFloat : at::kInt, channels,
                      a.x.device());
  check_grid_of(op, a.quant_min, a.quant_max);
  expect(a.batch_axis >= -1 && a.batch_axis < std::max<int64_t>(a.x.dim(), 1), op, "batch_axis",
         "-1 or an axis of x", a.batch_axis);
  expect(a.batch_axis < 0 || a.batch_axis != a.ch_axis, op, "batch_axis",
         "another axis than ch_axis", a.batch_axis);
  check_finite(op, row.parameter, a.parameter);
  if (learned) check_finite(op, "zero_point", *a.zero_point);
  // A learned zero point is used as the engines will use it: rounded, and on the grid.
  const at::Tensor whole = learned
                               ? a.zero_point->round().clamp_(a.quant_min, a.quant_max).to(at::kInt)
                               : a.zero_point.value_or(at::Tensor());
  double elements = 0;
  if (a.use_grad_scaling && a.x.numel() > 0) {
    elements = static_cast<double>(a.x.numel() / channels);
    if (a.batch_axis >= 0 && a.x.dim() > 0) elements /= static_cast<double>(a.x.size(a.batch_axis));
  }
  return {row.learned, dtype,       a.parameter, whole,   learned,
          a.ch_axis,   a.quant_min, a.quant_max, elements};
}

at::Tensor learned_fake_quant(const LearnedArguments& a) {
  const FakeQuantRow& row = check_method(text(a.method));
  return forward_of(row.name, check(row, a), a.x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const LearnedBackwardArguments& a) {
  const FakeQuantRow& row = check_method(text(a.forward.method));
  Gradients g = backward_of(row.name, check(row, a.forward), a.grad, a.forward.x);
  return {std::move(g.dx), std::move(g.parameter), std::move(g.zero_point)};
}

void register_ops(torch::Library& m) {
  impl<LearnedOp, learned_fake_quant>(m);
  impl<LearnedBackwardOp, backward>(m);
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
  const int64_t quant_min = (next++)->toInt(), quant_max = (next++)->toInt();
  int64_t ch_axis = -1, batch_axis = -1;
  bool use_grad_scaling = true;
  if (row.per_channel) {
    ch_axis = (next++)->toInt();
    use_grad_scaling = (next++)->toBool();
    batch_axis = (next++)->toInt();
  }
  torch::jit::push(
      *stack, call_op<LearnedOp>(x, c10::string_view(row.name), parameter, zero_point, quant_min,
                                 quant_max, ch_axis, use_grad_scaling, batch_axis));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  for (const FakeQuantRow& row : fake_quants())
    if (row.learned >= 0) m.impl(row.name, torch::CppFunction::makeFromBoxedFunction<&by_name>());
}

}  // namespace torch_ext::bindings
