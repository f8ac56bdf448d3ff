#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/arguments.h"
#include "bindings/backend.h"
#include "bindings/contracts.h"
#include "bindings/layout.h"

// fake_quant: quantize and dequantize, with the mask of the straight-through gradient.
namespace torch_ext::bindings {
namespace {

// Returns x quantized and dequantized; sets *bits, where not null, to the packed mask, uint8
// [(numel + 7) / 8], in the order of memory.
at::Tensor run(const FakeQuantArguments& a, at::IntArrayRef order, at::Tensor* bits) {
  constexpr const char* op = "fake_quant";
  const FakeQuantContract contract = check_fake_quant(op, a);
  at::Tensor out = empty_in(order, a.x);
  const at::Tensor data = with_strides_of(out, a.x);
  if (bits != nullptr) *bits = at::empty({(a.x.numel() + 7) / 8}, a.x.options().dtype(at::kByte));
  const core::FakeQuantJob job{data.const_data_ptr(),
                               out.mutable_data_ptr(),
                               bits == nullptr ? nullptr : bits->mutable_data_ptr<uint8_t>(),
                               channel_layout(out, a.ch_axis),
                               a.scale.const_data_ptr<float>(),
                               a.zero_point.const_data_ptr<int32_t>(),
                               contract.codes,
                               contract.rounding,
                               contract.mask};
  Backend(op, a.x).fake_quant_forward(contract.dtype, job);
  return out;
}

at::Tensor fake_quant(const FakeQuantArguments& arguments) {
  return run(arguments, order_of(arguments.x), nullptr);
}

std::tuple<at::Tensor, at::Tensor> forward(const FakeQuantArguments& arguments) {
  at::Tensor bits;
  at::Tensor out = run(arguments, arguments.order, &bits);
  return {std::move(out), std::move(bits)};
}

// by_last_axis: the mask is one of groups along the last axis (dynamic.cpp).
at::Tensor backward(const at::Tensor& grad, const at::Tensor& mask, at::IntArrayRef order,
                    bool by_last_axis) {
  const core::DType dtype = check_fake_quant_backward(grad, mask, order);
  at::Tensor dx = empty_in(order, grad);
  const at::IntArrayRef inner = by_last_axis ? order_by_last_axis(order, grad.dim()) : order;
  const at::Tensor dense = inner.size() == order.size() ? dx : empty_in(inner, grad);
  const at::Tensor data = with_strides_of(dense, grad);
  Backend("_fake_quant_backward", grad)
      .fake_quant_backward(dtype, data.const_data_ptr(), mask.const_data_ptr<uint8_t>(),
                           dense.mutable_data_ptr(), grad.numel());
  if (!dense.is_same(dx)) dx.copy_(dense);
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
