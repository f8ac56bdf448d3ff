#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/backend.h"
#include "bindings/checks.h"
#include "bindings/rules.h"
#include "rule_table.h"

// solve and solve_many turn statistics into ranges, qparams turns ranges into scales and zero
// points.
namespace torch_ext::bindings {

const char* rule_name(int32_t rule) { return rules()[rule].name; }

void check_range(const char* op, const at::Tensor& range, int64_t channels,
                 const at::Device& device) {
  check_device(op, "range", range);
  expect(range.device() == device, op, "range", device, range.device());
  expect(range.scalar_type() == at::kFloat, op, "range", "Float", range.scalar_type());
  if (range.dim() != 2 || range.size(1) != 2 || (channels >= 0 && range.size(0) != channels))
    expect(false, op, "range",
           channels >= 0 ? "of shape [" + std::to_string(channels) + ", 2]" : "of shape [C, 2]",
           range.sizes());
  expect(range.is_contiguous(), op, "range", "contiguous", "strides ", range.strides());
}

namespace {

at::Tensor solve(c10::string_view name, const at::Tensor& extrema, const at::Tensor& tally,
                 const at::Tensor& counts, int64_t quant_min, int64_t quant_max, bool symmetric,
                 c10::string_view scale_rule, bool power_of_two, at::ArrayRef<double> options) {
  constexpr const char* op = "solve";
  const int32_t rule = check_rule(op, text(name));
  const core::Statistic statistic = check_statistic(op, extrema, tally, counts, -1);
  const core::Grid grid =
      check_grid(op, quant_min, quant_max, symmetric, text(scale_rule), power_of_two);
  check_rule_use(op, rule, grid, statistic.layout, options.data(), options.size());
  at::Tensor range = at::empty({statistic.channels, 2}, extrema.options());
  const core::SolveJob job{
      rule,    grid,    options.data(), statistic, range.mutable_data_ptr<float>(),
      nullptr, nullptr, nullptr,        1};
  Backend(op, extrema).solve({job});
  return range;
}

using Tensors = std::vector<at::Tensor>;

std::tuple<Tensors, Tensors, Tensors> solve_many(
    const std::vector<std::string>& rules, at::TensorList extrema, at::TensorList tally,
    at::TensorList counts, at::IntArrayRef quant_min, at::IntArrayRef quant_max,
    const c10::List<bool>& symmetric, const std::vector<std::string>& scale_rule,
    const c10::List<bool>& power_of_two, at::ArrayRef<double> options) {
  constexpr const char* op = "solve_many";
  const size_t n = rules.size();
  const auto expect_length = [&](const char* argument, size_t length) {
    if (length != n) expect(false, op, argument, "a list of " + std::to_string(n), length);
  };
  expect_length("extrema", extrema.size());
  expect_length("tally", tally.size());
  expect_length("counts", counts.size());
  expect_length("quant_min", quant_min.size());
  expect_length("quant_max", quant_max.size());
  expect_length("symmetric", symmetric.size());
  expect_length("scale_rule", scale_rule.size());
  expect_length("power_of_two", power_of_two.size());
  Tensors range, scale, zero_point;
  std::vector<core::SolveJob> jobs;
  size_t used = 0;
  for (size_t i = 0; i < n; ++i) {
    const int32_t rule = check_rule(op, rules[i]);
    const core::Statistic statistic = check_statistic(op, extrema[i], tally[i], counts[i], -1);
    expect(extrema[i].device() == extrema[0].device(), op, "extrema", extrema[0].device(),
           extrema[i].device());
    const core::Grid grid = check_grid(op, quant_min[i], quant_max[i], symmetric.get(i),
                                       scale_rule[i], power_of_two.get(i));
    const size_t own = static_cast<size_t>(option_count_of(rule));
    if (options.size() < used + own)
      expect(false, op, "options", std::to_string(used + own) + " values or more", options.size());
    check_rule_use(op, rule, grid, statistic.layout, options.data() + used,
                   static_cast<int64_t>(own));
    range.push_back(at::empty({statistic.channels, 2}, extrema[i].options()));
    scale.push_back(at::empty({statistic.channels}, extrema[i].options()));
    zero_point.push_back(at::empty({statistic.channels}, extrema[i].options().dtype(at::kInt)));
    jobs.push_back({rule, grid, options.data() + used, statistic,
                    range.back().mutable_data_ptr<float>(), scale.back().mutable_data_ptr<float>(),
                    zero_point.back().mutable_data_ptr<int32_t>(), nullptr, 1});
    used += own;
  }
  if (used != options.size())
    expect(false, op, "options", std::to_string(used) + " values", options.size());
  if (n != 0) Backend(op, extrema[0]).solve(jobs);
  return {std::move(range), std::move(scale), std::move(zero_point)};
}

std::tuple<at::Tensor, at::Tensor> qparams(const at::Tensor& range, int64_t quant_min,
                                           int64_t quant_max, bool symmetric,
                                           c10::string_view scale_rule, bool power_of_two) {
  constexpr const char* op = "qparams";
  check_range(op, range, -1, range.device());
  const core::Grid grid =
      check_grid(op, quant_min, quant_max, symmetric, text(scale_rule), power_of_two);
  const int64_t channels = range.size(0);
  at::Tensor scale = at::empty({channels}, range.options());
  at::Tensor zero_point = at::empty({channels}, range.options().dtype(at::kInt));
  Backend(op, range).qparams(range, grid, scale, zero_point);
  return {scale, zero_point};
}

double option_value(const char* op, const core::Option& option, const c10::IValue& given) {
  if (option.choices == nullptr) return given.toDouble();
  const std::string& name = given.toStringRef();
  std::string known = "one of";
  for (int32_t i = 0; i < option.choice_count; ++i) {
    if (name == option.choices[i]) return i;
    known += i == 0 ? " " : ", ";
    known += option.choices[i];
  }
  expect(false, op, option.name, known, name);
  return 0;
}

// Kernel of each rule's one-shot op (one tensor in, its range out). Boxed, because the arguments
// depend on the rule's options.
void one_shot(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const std::string name = handle.schema().name().substr(sizeof("torch_ext::") - 1);
  const char* op = name.c_str();
  const int32_t rule = check_rule(op, name);
  constexpr size_t kFixed = 5;
  const size_t count = handle.schema().arguments().size();
  const auto argument = [&](size_t i) -> const c10::IValue& {
    return torch::jit::peek(*stack, i, count);
  };
  const at::Tensor x = argument(0).toTensor();
  const core::Grid grid =
      check_grid(op, argument(1).toInt(), argument(2).toInt(), argument(3).toBool(), "grid", false);
  const int64_t ch_axis = argument(4).toInt();
  std::vector<double> options;
  for (const core::Option& option : rules()[rule].options)
    options.push_back(option_value(op, option, argument(kFixed + options.size())));
  at::Tensor range = solve_tensor(x, ch_axis, rule, grid, options);
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, std::move(range));
}

void register_ops(torch::Library& m) {
  m.impl("solve", TORCH_FN(solve));
  m.impl("solve_many", TORCH_FN(solve_many));
  m.impl("qparams", TORCH_FN(qparams));
  for (const RuleRow& rule : rules())
    m.impl(rule.name, torch::CppFunction::makeFromBoxedFunction<&one_shot>());
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { register_ops(m); }

}  // namespace torch_ext::bindings
