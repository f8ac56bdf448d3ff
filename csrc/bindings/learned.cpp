#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/round.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "bindings/backend.h"
#include "bindings/checks.h"
#include "registry.h"

// Ops of fake-quants with a learned parameter.
namespace torch_ext::bindings {
namespace {

constexpr int32_t kLsq = 0, kPact = 1;

void check_grid_of(const char* op, int64_t quant_min, int64_t quant_max) {
  expect(quant_min >= -32768 && quant_min <= 0, op, "quant_min", "between -32768 and 0", quant_min);
  expect(quant_max >= 1 && quant_max <= 65535, op, "quant_max", "between 1 and 65535", quant_max);
}

// On a CUDA device a look would be a wait: there the output is NaN.
void check_finite(const char* op, const char* argument, const at::Tensor& t) {
  if (!t.is_cpu()) return;
  const float* const values = t.const_data_ptr<float>();
  for (int64_t c = 0; c < t.numel(); ++c)
    expect(std::isfinite(values[c]), op, argument, "finite", values[c], " in channel ", c);
}

struct Learned {
  int32_t method;
  core::DType dtype;
  at::Tensor parameter, zero_point;  // the zero point as integers
  bool learns_zero_point;
  int64_t ch_axis, quant_min, quant_max;
  double elements;
};

at::Tensor forward_of(const char* op, const Learned& l, const at::Tensor& x) {
  const c10::MaybeOwned<at::Tensor> data = x.expect_contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options());
  core::FakeQuantJob job{data->const_data_ptr(),
                         out.mutable_data_ptr(),
                         nullptr,
                         channel_layout(x, l.ch_axis),
                         l.parameter.const_data_ptr<float>(),
                         l.zero_point.const_data_ptr<int32_t>(),
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

Gradients backward_of(const char* op, const Learned& l, const at::Tensor& grad,
                      const at::Tensor& x) {
  expect(grad.sizes() == x.sizes(), op, "grad", x.sizes(), grad.sizes());
  expect(grad.scalar_type() == x.scalar_type(), op, "grad", x.scalar_type(), grad.scalar_type());
  expect(grad.device() == x.device(), op, "grad", x.device(), grad.device());
  const c10::MaybeOwned<at::Tensor> data = x.expect_contiguous(),
                                    upstream = grad.expect_contiguous();
  Gradients found{at::empty(x.sizes(), x.options()),
                  at::empty(l.parameter.sizes(), l.parameter.options()),
                  l.learns_zero_point ? at::empty(l.parameter.sizes(), l.parameter.options())
                                      : at::zeros(l.parameter.sizes(), l.parameter.options())};
  const core::LearnedJob job{
      l.method,
      data->const_data_ptr(),
      upstream->const_data_ptr(),
      found.dx.mutable_data_ptr(),
      channel_layout(x, l.ch_axis),
      l.parameter.const_data_ptr<float>(),
      l.zero_point.const_data_ptr<int32_t>(),
      static_cast<int32_t>(l.quant_min),
      static_cast<int32_t>(l.quant_max),
      l.elements,
      found.parameter.mutable_data_ptr<float>(),
      l.learns_zero_point ? found.zero_point.mutable_data_ptr<float>() : nullptr};
  Backend(op, x).learned_backward(l.dtype, job);
  return found;
}

Learned check_lsq(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                  int64_t quant_min, int64_t quant_max, int64_t ch_axis, bool use_grad_scaling,
                  int64_t batch_axis) {
  constexpr const char* op = "lsq";
  const core::DType dtype = check_data(op, "x", x);
  const int64_t channels = check_axis(op, x, ch_axis);
  check_per_channel(op, "scale", scale, at::kFloat, channels, x.device());
  const bool learned = zero_point.scalar_type() == at::kFloat;
  check_per_channel(op, "zero_point", zero_point, learned ? at::kFloat : at::kInt, channels,
                    x.device());
  check_grid_of(op, quant_min, quant_max);
  expect(batch_axis >= -1 && batch_axis < std::max<int64_t>(x.dim(), 1), op, "batch_axis",
         "-1 or an axis of x", batch_axis);
  expect(batch_axis < 0 || batch_axis != ch_axis, op, "batch_axis", "another axis than ch_axis",
         batch_axis);
  check_finite(op, "scale", scale);
  if (learned) check_finite(op, "zero_point", zero_point);
  // Learned, it is used as the engines will: a whole number on the grid.
  const at::Tensor whole =
      learned ? zero_point.round().clamp_(quant_min, quant_max).to(at::kInt) : zero_point;
  double elements = 0;
  if (use_grad_scaling && x.numel() > 0) {
    elements = static_cast<double>(x.numel() / channels);
    if (batch_axis >= 0 && x.dim() > 0) elements /= static_cast<double>(x.size(batch_axis));
  }
  return {kLsq, dtype, scale, whole, learned, ch_axis, quant_min, quant_max, elements};
}

at::Tensor lsq(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
               int64_t quant_min, int64_t quant_max, int64_t ch_axis, bool use_grad_scaling,
               int64_t batch_axis) {
  return forward_of(
      "lsq",
      check_lsq(x, scale, zero_point, quant_min, quant_max, ch_axis, use_grad_scaling, batch_axis),
      x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lsq_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
    const at::Tensor& zero_point, int64_t quant_min, int64_t quant_max, int64_t ch_axis,
    bool use_grad_scaling, int64_t batch_axis) {
  Gradients g = backward_of(
      "lsq",
      check_lsq(x, scale, zero_point, quant_min, quant_max, ch_axis, use_grad_scaling, batch_axis),
      grad, x);
  return {std::move(g.dx), std::move(g.parameter), std::move(g.zero_point)};
}

Learned check_pact(const at::Tensor& x, const at::Tensor& alpha, int64_t quant_min,
                   int64_t quant_max) {
  constexpr const char* op = "pact";
  const core::DType dtype = check_data(op, "x", x);
  check_per_channel(op, "alpha", alpha, at::kFloat, 1, x.device());
  check_grid_of(op, quant_min, quant_max);
  check_finite(op, "alpha", alpha);
  const at::Tensor none = at::zeros({1}, alpha.options().dtype(at::kInt));
  return {kPact, dtype, alpha, none, false, -1, quant_min, quant_max, 0};
}

at::Tensor pact(const at::Tensor& x, const at::Tensor& alpha, int64_t quant_min,
                int64_t quant_max) {
  return forward_of("pact", check_pact(x, alpha, quant_min, quant_max), x);
}

std::tuple<at::Tensor, at::Tensor> pact_backward(const at::Tensor& grad, const at::Tensor& x,
                                                 const at::Tensor& alpha, int64_t quant_min,
                                                 int64_t quant_max) {
  Gradients g = backward_of("pact", check_pact(x, alpha, quant_min, quant_max), grad, x);
  return {std::move(g.dx), std::move(g.parameter)};
}

void register_ops(torch::Library& m) {
  m.impl("lsq", TORCH_FN(lsq));
  m.impl("_lsq_backward", TORCH_FN(lsq_backward));
  m.impl("pact", TORCH_FN(pact));
  m.impl("_pact_backward", TORCH_FN(pact_backward));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { register_ops(m); }

}  // namespace torch_ext::bindings
