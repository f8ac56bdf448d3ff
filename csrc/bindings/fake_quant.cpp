#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/arguments.h"
#include "bindings/backend.h"
#include "bindings/checks.h"

// fake_quant: quantize and dequantize, with the mask of the straight-through gradient.
namespace torch_ext::bindings {
namespace {

// The CPU raises for values that no quantizer can have. On CUDA reading them would wait for the
// device, so there the output becomes NaN instead.
void check_values(const char* op, const FakeQuantArguments& a) {
  if (!a.scale.is_cpu()) return;
  const float* const scales = a.scale.const_data_ptr<float>();
  const int32_t* const zero_points = a.zero_point.const_data_ptr<int32_t>();
  for (int64_t c = 0; c < a.scale.numel(); ++c) {
    expect(core::is_valid_scale(scales[c]), op, "scale", "positive and finite", scales[c],
           " in channel ", c);
    expect(zero_points[c] >= a.quant_min && zero_points[c] <= a.quant_max, op, "zero_point",
           "between quant_min and quant_max", zero_points[c], " in channel ", c);
  }
}

core::DType check(const char* op, const FakeQuantArguments& a) {
  const core::DType dtype = check_data(op, "x", a.x);
  const int64_t channels = check_axis(op, a.x, a.ch_axis);
  check_per_channel(op, "scale", a.scale, at::kFloat, channels, a.x.device());
  check_per_channel(op, "zero_point", a.zero_point, at::kInt, channels, a.x.device());
  expect(a.quant_min >= -32768 && a.quant_min <= 65535, op, "quant_min", "between -32768 and 65535",
         a.quant_min);
  expect(a.quant_max > a.quant_min && a.quant_max <= 65535, op, "quant_max",
         "more than quant_min and at most 65535", a.quant_max);
  check_values(op, a);
  return dtype;
}

// Returns x quantized and dequantized; sets *bits, where not null, to the packed mask, uint8
// [(numel + 7) / 8].
at::Tensor run(const FakeQuantArguments& a, at::Tensor* bits) {
  constexpr const char* op = "fake_quant";
  const core::DType dtype = check(op, a);
  const core::Mask mask = parse_mask(op, text(a.mask));
  const core::Rounding rounding = parse_rounding(op, text(a.rounding));
  const c10::MaybeOwned<at::Tensor> data = a.x.expect_contiguous();
  at::Tensor out = at::empty(a.x.sizes(), a.x.options());
  if (bits != nullptr) *bits = at::empty({(a.x.numel() + 7) / 8}, a.x.options().dtype(at::kByte));
  const core::FakeQuantJob job{data->const_data_ptr(),
                               out.mutable_data_ptr(),
                               bits == nullptr ? nullptr : bits->mutable_data_ptr<uint8_t>(),
                               channel_layout(a.x, a.ch_axis),
                               a.scale.const_data_ptr<float>(),
                               a.zero_point.const_data_ptr<int32_t>(),
                               static_cast<int32_t>(a.quant_min),
                               static_cast<int32_t>(a.quant_max),
                               rounding,
                               mask};
  Backend(op, a.x).fake_quant_forward(dtype, job);
  return out;
}

at::Tensor fake_quant(const FakeQuantArguments& arguments) { return run(arguments, nullptr); }

std::tuple<at::Tensor, at::Tensor> forward(const FakeQuantArguments& arguments) {
  at::Tensor bits;
  at::Tensor out = run(arguments, &bits);
  return {std::move(out), std::move(bits)};
}

at::Tensor backward(const at::Tensor& grad, const at::Tensor& mask) {
  constexpr const char* op = "_fake_quant_backward";
  const core::DType dtype = check_data(op, "grad", grad);
  check_per_channel(op, "mask", mask, at::kByte, (grad.numel() + 7) / 8, grad.device());
  const c10::MaybeOwned<at::Tensor> data = grad.expect_contiguous();
  at::Tensor dx = at::empty(grad.sizes(), grad.options());
  Backend(op, grad).fake_quant_backward(dtype, data->const_data_ptr(),
                                        mask.const_data_ptr<uint8_t>(), dx.mutable_data_ptr(),
                                        grad.numel());
  return dx;
}

void register_ops(torch::Library& m) {
  impl<FakeQuantOp, fake_quant>(m);
  impl<FakeQuantForwardOp, forward>(m);
  m.impl("_fake_quant_backward", TORCH_FN(backward));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { register_ops(m); }

}  // namespace torch_ext::bindings
