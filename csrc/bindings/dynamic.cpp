#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/arguments.h"
#include "bindings/backend.h"
#include "bindings/contracts.h"
#include "bindings/layout.h"

// dynamic_fake_quant: fake-quant of groups along the last axis, with the scales of their own
// values.
namespace torch_ext::bindings {
namespace {

// As run() of fake_quant.cpp.
at::Tensor run(const DynamicArguments& a, at::IntArrayRef order, at::Tensor* bits) {
  const DynamicContract contract = check_dynamic(a);
  at::Tensor out = empty_in(order, a.x);
  const at::IntArrayRef inner = order_by_last_axis(order, a.x.dim());
  const at::Tensor dense = inner.size() == order.size() ? out : empty_in(inner, a.x);
  const at::Tensor data = with_strides_of(dense, a.x);
  const int64_t numel = a.x.numel(), group_size = contract.group_size.expect_int();
  if (bits != nullptr) *bits = at::empty({(numel + 7) / 8}, a.x.options().dtype(at::kByte));
  if (numel == 0) return out;
  const core::DynamicJob job{
      data.const_data_ptr(),
      dense.mutable_data_ptr(),
      bits == nullptr ? nullptr : bits->mutable_data_ptr<uint8_t>(),
      numel / group_size,
      group_size,
      contract.grid,
      contract.rounding,
      contract.grid.has_tensor_scale() ? a.tensor_scale->const_data_ptr<float>() : nullptr};
  Backend("dynamic_fake_quant", a.x).dynamic_fake_quant(contract.dtype, job);
  if (!dense.is_same(out)) out.copy_(dense);
  return out;
}

at::Tensor dynamic_fake_quant(const DynamicArguments& arguments) {
  return run(arguments, order_of(arguments.x), nullptr);
}

std::tuple<at::Tensor, at::Tensor> forward(const DynamicArguments& arguments) {
  at::Tensor bits;
  at::Tensor out = run(arguments, arguments.order, &bits);
  return {std::move(out), std::move(bits)};
}

void register_ops(torch::Library& m) {
  impl<DynamicOp, dynamic_fake_quant>(m);
  impl<DynamicForwardOp, forward>(m);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { register_ops(m); }

}  // namespace torch_ext::bindings
