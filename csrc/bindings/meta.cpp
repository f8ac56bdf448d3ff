#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/contracts.h"
#include "bindings/layout.h"

// Meta kernels: shapes and types of the results, for tracing.
namespace torch_ext::bindings {
namespace {

using Text = c10::string_view;

at::Tensor like(const at::Tensor& x) { return empty_in(order_of(x), x); }

// One bit per element, in bytes.
at::Tensor mask_of(const at::Tensor& x, bool kept = true) {
  const c10::SymInt bytes = kept ? (x.sym_numel() + 7) / 8 : c10::SymInt(0);
  return at::empty_symint({bytes}, x.options().dtype(at::kByte));
}

at::Tensor fake_quant(const FakeQuantArguments& a) {
  check_fake_quant("fake_quant", a);
  return like(a.x);
}

std::tuple<at::Tensor, at::Tensor> forward(const FakeQuantArguments& a) {
  check_fake_quant("fake_quant", a);
  return {empty_in(a.order, a.x), mask_of(a.x)};
}

at::Tensor backward(const at::Tensor& grad, const at::Tensor& mask, at::IntArrayRef order,
                    bool /*by_last_axis*/) {
  check_fake_quant_backward(grad, mask, order);
  return empty_in(order, grad);
}

at::Tensor dynamic_fake_quant(const DynamicArguments& a) {
  check_dynamic(a);
  return like(a.x);
}

std::tuple<at::Tensor, at::Tensor> dynamic_forward(const DynamicArguments& a) {
  check_dynamic(a);
  return {empty_in(a.order, a.x), mask_of(a.x)};
}

at::Tensor learned_fake_quant(const LearnedArguments& a) {
  check_learned(a);
  return like(a.x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> learned_fake_quant_backward(
    const LearnedBackwardArguments& a) {
  check_learned(a);
  const auto wanted = [](bool is, const at::Tensor& t) {
    return is ? like(t) : at::empty({0}, t.options());
  };
  const at::Tensor& parameter = a.forward.parameter;
  return {wanted(a.of_x, a.forward.x), wanted(a.of_parameters, parameter),
          wanted(a.of_parameters, parameter), wanted(a.of_parameters, parameter)};
}

at::Tensor learned_fake_quant_tangent(const LearnedTangentArguments& a) {
  check_learned(a);
  return like(a.forward.x);
}

void observe_(const at::Tensor& x, const at::Tensor& extrema, const at::Tensor& tally,
              const at::Tensor& counts, int64_t ch_axis) {
  check_observe(x, extrema, tally, counts, ch_axis);
}

void merge_(const at::Tensor& extrema, const at::Tensor& tally, const at::Tensor& counts,
            const at::Tensor& other_extrema, const at::Tensor& other_tally,
            const at::Tensor& other_counts) {
  check_merge(extrema, tally, counts, other_extrema, other_tally, other_counts);
}

void follow_(const FollowArguments& a) { check_follow("follow_", a); }

at::Tensor follow_fake_quant(const FollowArguments& a) {
  check_follow("follow_fake_quant", a);
  return like(a.x);
}

std::tuple<at::Tensor, at::Tensor> follow_forward(const FollowArguments& a) {
  check_follow("follow_fake_quant", a);
  return {empty_in(a.order, a.x), mask_of(a.x, a.with_mask)};
}

at::Tensor range_of(const at::Tensor& extrema) {
  return at::empty_symint({extrema.sym_size(0), 2}, extrema.options().dtype(at::kFloat));
}

at::Tensor solve(const SolveArguments& a) {
  check_solve(a);
  return range_of(a.extrema);
}

std::tuple<at::Tensor, at::Tensor> qparams_of(const at::Tensor& range) {
  return {at::empty_symint({range.sym_size(0)}, range.options()),
          at::empty_symint({range.sym_size(0)}, range.options().dtype(at::kInt))};
}

using Tensors = SolveManyOp::Tensors;

std::tuple<Tensors, Tensors, Tensors> solve_many(const SolveManyArguments& a) {
  check_solve_many(a);
  Tensors range, scale, zero_point;
  for (const at::Tensor& t : a.extrema) {
    range.push_back(range_of(t));
    auto [s, z] = qparams_of(range.back());
    scale.push_back(s);
    zero_point.push_back(z);
  }
  return {range, scale, zero_point};
}

std::tuple<at::Tensor, at::Tensor> qparams(const at::Tensor& range, Text grid,
                                           const std::optional<at::Tensor>& tensor_scale) {
  check_qparams(range, grid, tensor_scale);
  return qparams_of(range);
}

std::tuple<at::Tensor, at::Tensor> kl_threshold(const at::Tensor& counts,
                                                const at::Tensor& bin_width, int64_t levels,
                                                Text variant) {
  check_kl_threshold(counts, bin_width, levels, variant);
  return {at::empty_symint({counts.sym_size(0)}, counts.options()),
          at::empty_symint({counts.sym_size(0)}, bin_width.options())};
}

at::Tensor gptq(const at::Tensor& weight, const at::Tensor& factor, const at::Tensor& scale,
                const at::Tensor& zero_point, Text grid) {
  check_gptq(weight, factor, scale, zero_point, grid);
  return at::empty_symint(weight.sym_sizes(), weight.options());
}

void one_shot(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const OneShot call = check_one_shot(handle, *stack);
  at::Tensor range = at::empty_symint({call.channels, 2}, call.x.options().dtype(at::kFloat));
  torch::jit::drop(*stack, handle.schema().arguments().size());
  torch::jit::push(*stack, std::move(range));
}

TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  impl<FakeQuantOp, fake_quant>(m);
  impl<FakeQuantForwardOp, forward>(m);
  m.impl("_fake_quant_backward", TORCH_FN(backward));
  impl<DynamicOp, dynamic_fake_quant>(m);
  impl<DynamicForwardOp, dynamic_forward>(m);
  impl<LearnedOp, learned_fake_quant>(m);
  impl<LearnedBackwardOp, learned_fake_quant_backward>(m);
  impl<LearnedTangentOp, learned_fake_quant_tangent>(m);
  m.impl("observe_", TORCH_FN(observe_));
  m.impl("merge_", TORCH_FN(merge_));
  impl<FollowOp, follow_>(m);
  impl<FollowFakeQuantOp, follow_fake_quant>(m);
  impl<FollowForwardOp, follow_forward>(m);
  impl<SolveOp, solve>(m);
  impl<SolveManyOp, solve_many>(m);
  m.impl("qparams", TORCH_FN(qparams));
  m.impl("kl_threshold", TORCH_FN(kl_threshold));
  m.impl("gptq", TORCH_FN(gptq));
  for (const RuleRow& rule : rules())
    m.impl(rule.name, torch::CppFunction::makeFromBoxedFunction<&one_shot>());
}

}  // namespace
}  // namespace torch_ext::bindings
