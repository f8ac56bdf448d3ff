#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/backend.h"
#include "bindings/contracts.h"
#include "bindings/exclusive.h"
#include "bindings/rules.h"
#include "rule_table.h"

// solve and solve_many turn statistics into ranges, qparams turns ranges into scales and zero
// points.
namespace torch_ext::bindings {

const char* rule_name(int32_t rule) { return rules()[rule].name; }

namespace {

at::Tensor solve(c10::string_view name, const at::Tensor& extrema, const at::Tensor& tally,
                 const at::Tensor& counts, int64_t quant_min, int64_t quant_max, bool symmetric,
                 c10::string_view scale_rule, bool power_of_two, at::ArrayRef<double> options) {
  const SolveContract c = check_solve(name, extrema, tally, counts, quant_min, quant_max, symmetric,
                                      scale_rule, power_of_two, options);
  at::Tensor range = at::empty({c.statistic.channels, 2}, extrema.options());
  const core::SolveJob job{
      c.rule,  c.grid,  c.options, c.statistic, range.mutable_data_ptr<float>(), nullptr,
      nullptr, nullptr, 1};
  const Exclusive exclusive(tally);  // another thread may observe meanwhile
  Backend("solve", extrema).solve({job});
  return range;
}

using Tensors = std::vector<at::Tensor>;

std::tuple<Tensors, Tensors, Tensors> solve_many(
    const std::vector<std::string>& rules, at::TensorList extrema, at::TensorList tally,
    at::TensorList counts, at::IntArrayRef quant_min, at::IntArrayRef quant_max,
    const c10::List<bool>& symmetric, const std::vector<std::string>& scale_rule,
    const c10::List<bool>& power_of_two, at::ArrayRef<double> options) {
  const std::vector<SolveContract> contracts =
      check_solve_many(rules, extrema, tally, counts, quant_min, quant_max, symmetric, scale_rule,
                       power_of_two, options);
  Tensors range, scale, zero_point;
  std::vector<core::SolveJob> jobs;
  for (size_t i = 0; i < contracts.size(); ++i) {
    const SolveContract& c = contracts[i];
    const int64_t channels = c.statistic.channels;
    range.push_back(at::empty({channels, 2}, extrema[i].options()));
    scale.push_back(at::empty({channels}, extrema[i].options()));
    zero_point.push_back(at::empty({channels}, extrema[i].options().dtype(at::kInt)));
    jobs.push_back({c.rule, c.grid, c.options, c.statistic, range.back().mutable_data_ptr<float>(),
                    scale.back().mutable_data_ptr<float>(),
                    zero_point.back().mutable_data_ptr<int32_t>(), nullptr, 1});
  }
  const Exclusive exclusive(tally);
  if (!jobs.empty()) Backend("solve_many", extrema[0]).solve(jobs);
  return {std::move(range), std::move(scale), std::move(zero_point)};
}

std::tuple<at::Tensor, at::Tensor> qparams(const at::Tensor& range, int64_t quant_min,
                                           int64_t quant_max, bool symmetric,
                                           c10::string_view scale_rule, bool power_of_two) {
  const core::Grid grid =
      check_qparams(range, quant_min, quant_max, symmetric, scale_rule, power_of_two);
  const int64_t channels = range.size(0);
  at::Tensor scale = at::empty({channels}, range.options());
  at::Tensor zero_point = at::empty({channels}, range.options().dtype(at::kInt));
  Backend("qparams", range).qparams(range, grid, scale, zero_point);
  return {scale, zero_point};
}

// Kernel of each rule's one-shot op (one tensor in, its range out). Boxed, because the arguments
// depend on the rule's options.
void one_shot(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  at::Tensor range = solve_tensor(check_one_shot(handle, *stack));
  torch::jit::drop(*stack, handle.schema().arguments().size());
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
