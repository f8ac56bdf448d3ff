#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <initializer_list>
#include <tuple>

#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "rule_table.h"

// Meta kernels: shapes and types of the results, for tracing. Sizes may be symbolic, so only what
// needs no concrete size is checked.
namespace torch_ext::bindings {
namespace {

using Text = c10::string_view;

// Dispatch comes here if any tensor is on meta. A call that mixes devices would then return without
// computing anything, so it raises.
struct Named {
  const char* name;
  const at::Tensor& tensor;
};
void expect_meta(const char* op, std::initializer_list<Named> arguments) {
  for (const Named& argument : arguments)
    expect(argument.tensor.is_meta(), op, argument.name, "on one device with the others, meta",
           argument.tensor.device());
}

at::Tensor like(const at::Tensor& x) { return at::empty_symint(x.sym_sizes(), x.options()); }

// One bit per element, in bytes.
at::Tensor mask_of(const at::Tensor& x, bool kept = true) {
  const c10::SymInt bytes = kept ? (x.sym_numel() + 7) / 8 : c10::SymInt(0);
  return at::empty_symint({bytes}, x.options().dtype(at::kByte));
}

at::Tensor fake_quant(const FakeQuantArguments& a) {
  expect_meta("fake_quant", {{"x", a.x}, {"scale", a.scale}, {"zero_point", a.zero_point}});
  return like(a.x);
}

std::tuple<at::Tensor, at::Tensor> forward(const FakeQuantArguments& a) {
  return {fake_quant(a), mask_of(a.x)};
}

at::Tensor backward(const at::Tensor& grad, const at::Tensor& mask) {
  expect_meta("_fake_quant_backward", {{"grad", grad}, {"mask", mask}});
  return like(grad);
}

at::Tensor learned_fake_quant(const LearnedArguments& a) {
  const FakeQuantRow& row = check_method(text(a.method));
  expect_meta(row.name, {{"x", a.x}, {row.parameter, a.parameter}});
  if (a.zero_point) expect_meta(row.name, {{"zero_point", *a.zero_point}});
  return like(a.x);
}

at::Tensor like_parameter(const at::Tensor& p) {
  return at::empty_symint(p.sym_sizes(), p.options().dtype(at::kFloat));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> learned_fake_quant_backward(
    const LearnedBackwardArguments& a) {
  expect_meta(check_method(text(a.forward.method)).name, {{"grad", a.grad}});
  return {learned_fake_quant(a.forward), like_parameter(a.forward.parameter),
          like_parameter(a.forward.parameter)};
}

void observe_(const at::Tensor& x, const at::Tensor& extrema, const at::Tensor& tally,
              const at::Tensor& counts, int64_t) {
  expect_meta("observe_", {{"x", x}, {"extrema", extrema}, {"tally", tally}, {"counts", counts}});
}

void merge_(const at::Tensor& extrema, const at::Tensor& tally, const at::Tensor& counts,
            const at::Tensor& other_extrema, const at::Tensor& other_tally,
            const at::Tensor& other_counts) {
  expect_meta("merge_", {{"extrema", extrema},
                         {"tally", tally},
                         {"counts", counts},
                         {"other_extrema", other_extrema},
                         {"other_tally", other_tally},
                         {"other_counts", other_counts}});
}

void expect_meta_follow(const char* op, const FollowArguments& a) {
  expect_meta(op, {{"x", a.x},
                   {"range", a.range},
                   {"scale", a.scale},
                   {"zero_point", a.zero_point},
                   {"solved", a.solved}});
}

void follow_(const FollowArguments& a) { expect_meta_follow("follow_", a); }

std::tuple<at::Tensor, at::Tensor> follow_forward(const FollowArguments& a) {
  expect_meta_follow("follow_fake_quant", a);
  return {like(a.x), mask_of(a.x, a.with_mask)};
}

at::Tensor follow_fake_quant(const FollowArguments& a) { return std::get<0>(follow_forward(a)); }

at::Tensor range_of(const at::Tensor& extrema) {
  return at::empty_symint({extrema.sym_size(0), 2}, extrema.options().dtype(at::kFloat));
}

at::Tensor solve(Text, const at::Tensor& extrema, const at::Tensor& tally, const at::Tensor& counts,
                 int64_t, int64_t, bool, Text, bool, at::ArrayRef<double>) {
  expect_meta("solve", {{"extrema", extrema}, {"tally", tally}, {"counts", counts}});
  return range_of(extrema);
}

std::tuple<at::Tensor, at::Tensor> qparams_of(const at::Tensor& range) {
  return {at::empty_symint({range.sym_size(0)}, range.options()),
          at::empty_symint({range.sym_size(0)}, range.options().dtype(at::kInt))};
}

using Tensors = std::vector<at::Tensor>;

std::tuple<Tensors, Tensors, Tensors> solve_many(const std::vector<std::string>&,
                                                 at::TensorList extrema, at::TensorList tally,
                                                 at::TensorList counts, at::IntArrayRef,
                                                 at::IntArrayRef, const c10::List<bool>&,
                                                 const std::vector<std::string>&,
                                                 const c10::List<bool>&, at::ArrayRef<double>) {
  Tensors range, scale, zero_point;
  for (const at::Tensor& t : tally) expect_meta("solve_many", {{"tally", t}});
  for (const at::Tensor& t : counts) expect_meta("solve_many", {{"counts", t}});
  for (const at::Tensor& t : extrema) {
    expect_meta("solve_many", {{"extrema", t}});
    range.push_back(range_of(t));
    auto [s, z] = qparams_of(range.back());
    scale.push_back(s);
    zero_point.push_back(z);
  }
  return {range, scale, zero_point};
}

std::tuple<at::Tensor, at::Tensor> qparams(const at::Tensor& range, int64_t, int64_t, bool, Text,
                                           bool) {
  return qparams_of(range);
}

std::tuple<at::Tensor, at::Tensor> kl_threshold(const at::Tensor& counts,
                                                const at::Tensor& bin_width, int64_t, Text) {
  expect_meta("kl_threshold", {{"counts", counts}, {"bin_width", bin_width}});
  return {at::empty_symint({counts.sym_size(0)}, counts.options()),
          at::empty_symint({counts.sym_size(0)}, bin_width.options())};
}

void one_shot(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const size_t count = handle.schema().arguments().size();
  const at::Tensor x = torch::jit::peek(*stack, 0, count).toTensor();
  const int64_t ch_axis = torch::jit::peek(*stack, 4, count).toInt();
  const c10::SymInt channels = ch_axis < 0 ? c10::SymInt(1) : x.sym_size(ch_axis);
  at::Tensor range = at::empty_symint({channels, 2}, x.options().dtype(at::kFloat));
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, std::move(range));
}

TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  impl<FakeQuantOp, fake_quant>(m);
  impl<FakeQuantForwardOp, forward>(m);
  m.impl("_fake_quant_backward", TORCH_FN(backward));
  impl<LearnedOp, learned_fake_quant>(m);
  impl<LearnedBackwardOp, learned_fake_quant_backward>(m);
  m.impl("observe_", TORCH_FN(observe_));
  m.impl("merge_", TORCH_FN(merge_));
  impl<FollowOp, follow_>(m);
  impl<FollowFakeQuantOp, follow_fake_quant>(m);
  impl<FollowForwardOp, follow_forward>(m);
  m.impl("solve", TORCH_FN(solve));
  m.impl("solve_many", TORCH_FN(solve_many));
  m.impl("qparams", TORCH_FN(qparams));
  m.impl("kl_threshold", TORCH_FN(kl_threshold));
  for (const RuleRow& rule : rules())
    m.impl(rule.name, torch::CppFunction::makeFromBoxedFunction<&one_shot>());
}

}  // namespace
}  // namespace torch_ext::bindings
