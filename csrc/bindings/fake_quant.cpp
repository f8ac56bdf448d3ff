#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/backend.h"
#include "bindings/checks.h"

// Ops that quantize and dequantize.
namespace torch_ext::bindings {
namespace {

struct Arguments {
  core::DType dtype;
  core::ChannelLayout layout;
  core::Mask mask;
  core::Rounding rounding;
};

// On a CUDA device looking would mean waiting for it: there the output becomes NaN instead.
void check_values(const char* op, const at::Tensor& scale, const at::Tensor& zero_point,
                  int64_t quant_min, int64_t quant_max) {
  if (!scale.is_cpu()) return;
  const float* const scales = scale.const_data_ptr<float>();
  const int32_t* const zero_points = zero_point.const_data_ptr<int32_t>();
  for (int64_t c = 0; c < scale.numel(); ++c) {
    expect(core::is_valid_scale(scales[c]), op, "scale", "positive and finite", scales[c],
           " in channel ", c);
    expect(zero_points[c] >= quant_min && zero_points[c] <= quant_max, op, "zero_point",
           "between quant_min and quant_max", zero_points[c], " in channel ", c);
  }
}

Arguments check(const char* op, const at::Tensor& x, const at::Tensor& scale,
                const at::Tensor& zero_point, int64_t quant_min, int64_t quant_max, int64_t ch_axis,
                c10::string_view mask, c10::string_view rounding) {
  const core::DType dtype = check_data(op, "x", x);
  const int64_t channels = check_axis(op, x, ch_axis);
  check_per_channel(op, "scale", scale, at::kFloat, channels, x.device());
  check_per_channel(op, "zero_point", zero_point, at::kInt, channels, x.device());
  expect(quant_min >= -32768 && quant_min <= 65535, op, "quant_min", "between -32768 and 65535",
         quant_min);
  expect(quant_max > quant_min && quant_max <= 65535, op, "quant_max",
         "more than quant_min and at most 65535", quant_max);
  check_values(op, scale, zero_point, quant_min, quant_max);
  return {dtype, channel_layout(x, ch_axis), parse_mask(op, {mask.data(), mask.size()}),
          parse_rounding(op, {rounding.data(), rounding.size()})};
}

at::Tensor run(const char* op, const at::Tensor& x, const at::Tensor& scale,
               const at::Tensor& zero_point, int64_t quant_min, int64_t quant_max, int64_t ch_axis,
               c10::string_view mask, c10::string_view rounding, at::Tensor* bits) {
  const Arguments a =
      check(op, x, scale, zero_point, quant_min, quant_max, ch_axis, mask, rounding);
  const c10::MaybeOwned<at::Tensor> data = x.expect_contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options());
  if (bits != nullptr) *bits = at::empty({(x.numel() + 7) / 8}, x.options().dtype(at::kByte));
  const core::FakeQuantJob job{data->const_data_ptr(),
                               out.mutable_data_ptr(),
                               bits == nullptr ? nullptr : bits->mutable_data_ptr<uint8_t>(),
                               a.layout,
                               scale.const_data_ptr<float>(),
                               zero_point.const_data_ptr<int32_t>(),
                               static_cast<int32_t>(quant_min),
                               static_cast<int32_t>(quant_max),
                               a.rounding,
                               a.mask};
  Backend(op, x).fake_quant_forward(a.dtype, job);
  return out;
}

at::Tensor fake_quant(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                      int64_t quant_min, int64_t quant_max, int64_t ch_axis, c10::string_view mask,
                      c10::string_view rounding) {
  return run("fake_quant", x, scale, zero_point, quant_min, quant_max, ch_axis, mask, rounding,
             nullptr);
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& scale,
                                           const at::Tensor& zero_point, int64_t quant_min,
                                           int64_t quant_max, int64_t ch_axis,
                                           c10::string_view mask, c10::string_view rounding) {
  at::Tensor bits;
  at::Tensor out =
      run("fake_quant", x, scale, zero_point, quant_min, quant_max, ch_axis, mask, rounding, &bits);
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
  m.impl("fake_quant", TORCH_FN(fake_quant));
  m.impl("_fake_quant_forward", TORCH_FN(forward));
  m.impl("_fake_quant_backward", TORCH_FN(backward));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { register_ops(m); }

}  // namespace torch_ext::bindings
