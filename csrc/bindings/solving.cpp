#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/arguments.h"
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

at::Tensor solve(const SolveArguments& a) {
  const SolveContract c = check_solve(a);
  at::Tensor range = at::empty({c.statistic.channels, 2}, a.extrema.options());
  const core::SolveJob job{
      c.rule,  c.grid,  c.options, c.statistic, range.mutable_data_ptr<float>(), nullptr,
      nullptr, nullptr, 1};
  const Exclusive exclusive(a.tally);  // another thread may observe meanwhile
  Backend("solve", a.extrema).solve({job});
  return range;
}

using Tensors = SolveManyOp::Tensors;

std::tuple<Tensors, Tensors, Tensors> solve_many(const SolveManyArguments& a) {
  const std::vector<SolveContract> contracts = check_solve_many(a);
  Tensors range, scale, zero_point;
  std::vector<core::SolveJob> jobs;
  for (size_t i = 0; i < contracts.size(); ++i) {
    const SolveContract& c = contracts[i];
    const int64_t channels = c.statistic.channels;
    range.push_back(at::empty({channels, 2}, a.extrema[i].options()));
    scale.push_back(at::empty({channels}, a.extrema[i].options()));
    zero_point.push_back(at::empty({channels}, a.extrema[i].options().dtype(at::kInt)));
    jobs.push_back({c.rule, c.grid, c.options, c.statistic, range.back().mutable_data_ptr<float>(),
                    scale.back().mutable_data_ptr<float>(),
                    zero_point.back().mutable_data_ptr<int32_t>(), nullptr, 1});
  }
  const Exclusive exclusive(a.tally);
  if (!jobs.empty()) Backend("solve_many", a.extrema[0]).solve(jobs);
  return {std::move(range), std::move(scale), std::move(zero_point)};
}

std::tuple<at::Tensor, at::Tensor> qparams(const at::Tensor& range, c10::string_view grid_text,
                                           const std::optional<at::Tensor>& tensor_scale) {
  const core::Grid grid = check_qparams(range, grid_text, tensor_scale);
  const int64_t channels = range.size(0);
  at::Tensor scale = at::empty({channels}, range.options());
  at::Tensor zero_point = at::empty({channels}, range.options().dtype(at::kInt));
  Backend("qparams", range).qparams(range, grid, tensor_scale, scale, zero_point);
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
  impl<SolveOp, solve>(m);
  impl<SolveManyOp, solve_many>(m);
  m.impl("qparams", TORCH_FN(qparams));
  for (const RuleRow& rule : rules())
    m.impl(rule.name, torch::CppFunction::makeFromBoxedFunction<&one_shot>());
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { register_ops(m); }

}  // namespace torch_ext::bindings
