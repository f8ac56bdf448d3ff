#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <initializer_list>
#include <tuple>

#include "bindings/checks.h"
#include "rule_table.h"

// Shapes and types of results, for tracing. Sizes may be symbols, so only what needs no value is
// checked.
namespace torch_ext::bindings {
namespace {

using Text = c10::string_view;

// A tensor on another device than the rest would otherwise end here, and nothing would be computed.
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

at::Tensor fake_quant(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                      int64_t, int64_t, int64_t, Text, Text) {
  expect_meta("fake_quant", {{"x", x}, {"scale", scale}, {"zero_point", zero_point}});
  return like(x);
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& scale,
                                           const at::Tensor& zero_point, int64_t, int64_t, int64_t,
                                           Text, Text) {
  expect_meta("fake_quant", {{"x", x}, {"scale", scale}, {"zero_point", zero_point}});
  return {like(x), at::empty_symint({(x.sym_numel() + 7) / 8}, x.options().dtype(at::kByte))};
}

at::Tensor backward(const at::Tensor& grad, const at::Tensor& mask) {
  expect_meta("_fake_quant_backward", {{"grad", grad}, {"mask", mask}});
  return like(grad);
}

at::Tensor learned_fake_quant(const at::Tensor& x, Text method, const at::Tensor& parameter,
                              const std::optional<at::Tensor>& zero_point, int64_t, int64_t,
                              int64_t, bool, int64_t) {
  const FakeQuantRow& row = check_method(text(method));
  expect_meta(row.name, {{"x", x}, {row.parameter, parameter}});
  if (zero_point) expect_meta(row.name, {{"zero_point", *zero_point}});
  return like(x);
}

at::Tensor like_parameter(const at::Tensor& p) {
  return at::empty_symint(p.sym_sizes(), p.options().dtype(at::kFloat));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> learned_fake_quant_backward(
    const at::Tensor& grad, const at::Tensor& x, Text method, const at::Tensor& parameter,
    const std::optional<at::Tensor>& zero_point, int64_t, int64_t, int64_t, bool, int64_t) {
  const FakeQuantRow& row = check_method(text(method));
  expect_meta(row.name, {{"grad", grad}, {"x", x}, {row.parameter, parameter}});
  if (zero_point) expect_meta(row.name, {{"zero_point", *zero_point}});
  return {like(x), like_parameter(parameter), like_parameter(parameter)};
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

void follow_(const at::Tensor& x, const at::Tensor& range, const at::Tensor& scale,
             const at::Tensor& zero_point, const at::Tensor& solved, double, Text, int64_t, int64_t,
             bool, Text, bool, at::ArrayRef<double>, int64_t, int64_t, int64_t) {
  expect_meta("follow_", {{"x", x},
                          {"range", range},
                          {"scale", scale},
                          {"zero_point", zero_point},
                          {"solved", solved}});
}

std::tuple<at::Tensor, at::Tensor> follow_forward(
    const at::Tensor& x, const at::Tensor& range, const at::Tensor& scale,
    const at::Tensor& zero_point, const at::Tensor& solved, double, Text, int64_t, int64_t, bool,
    Text, bool, at::ArrayRef<double>, int64_t, int64_t, int64_t, Text, Text, bool with_mask) {
  expect_meta("follow_fake_quant", {{"x", x},
                                    {"range", range},
                                    {"scale", scale},
                                    {"zero_point", zero_point},
                                    {"solved", solved}});
  const c10::SymInt bytes = with_mask ? (x.sym_numel() + 7) / 8 : c10::SymInt(0);
  return {like(x), at::empty_symint({bytes}, x.options().dtype(at::kByte))};
}

at::Tensor follow_fake_quant(const at::Tensor& x, const at::Tensor& range, const at::Tensor& scale,
                             const at::Tensor& zero_point, const at::Tensor& solved, double c,
                             Text rule, int64_t quant_min, int64_t quant_max, bool symmetric,
                             Text scale_rule, bool power_of_two, at::ArrayRef<double> options,
                             int64_t ch_axis, int64_t mantissa_bits, int64_t octaves, Text mask,
                             Text rounding) {
  return std::get<0>(follow_forward(x, range, scale, zero_point, solved, c, rule, quant_min,
                                    quant_max, symmetric, scale_rule, power_of_two, options,
                                    ch_axis, mantissa_bits, octaves, mask, rounding, false));
}

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
  m.impl("fake_quant", TORCH_FN(fake_quant));
  m.impl("_fake_quant_forward", TORCH_FN(forward));
  m.impl("_fake_quant_backward", TORCH_FN(backward));
  m.impl("learned_fake_quant", TORCH_FN(learned_fake_quant));
  m.impl("_learned_fake_quant_backward", TORCH_FN(learned_fake_quant_backward));
  m.impl("observe_", TORCH_FN(observe_));
  m.impl("merge_", TORCH_FN(merge_));
  m.impl("follow_", TORCH_FN(follow_));
  m.impl("follow_fake_quant", TORCH_FN(follow_fake_quant));
  m.impl("_follow_fake_quant_forward", TORCH_FN(follow_forward));
  m.impl("solve", TORCH_FN(solve));
  m.impl("solve_many", TORCH_FN(solve_many));
  m.impl("qparams", TORCH_FN(qparams));
  m.impl("kl_threshold", TORCH_FN(kl_threshold));
  for (const RuleRow& rule : rules())
    m.impl(rule.name, torch::CppFunction::makeFromBoxedFunction<&one_shot>());
}

}  // namespace
}  // namespace torch_ext::bindings
