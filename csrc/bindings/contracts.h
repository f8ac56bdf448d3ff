#pragma once

#include <ATen/core/stack.h>

#include <vector>

#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "observers/kl_reference_tables.h"
#include "rule_table.h"

// The contracts of the ops: one function for each, called by the kernels of all devices, so that a
// call that raises does so while a graph is traced already. Values of tensors are checked where
// they can be read, on the CPU.
namespace torch_ext::bindings {

struct FakeQuantContract {
  core::DType dtype;
  core::Codes codes;
  core::Rounding rounding;
  core::Mask mask;
};
FakeQuantContract check_fake_quant(const char* op, const FakeQuantArguments& a);
core::DType check_fake_quant_backward(const at::Tensor& grad, const at::Tensor& mask,
                                      at::IntArrayRef order);

struct DynamicContract {
  core::DType dtype;
  c10::SymInt group_size;  // 0 if there are no values
  core::Grid grid;
  core::Rounding rounding;
};
DynamicContract check_dynamic(const DynamicArguments& a);

struct LearnedContract {
  const FakeQuantRow& row;
  core::DType dtype;
  core::Codes codes;
  bool learns_zero_point;
};
LearnedContract check_learned(const LearnedArguments& a);
LearnedContract check_learned(const LearnedBackwardArguments& a);
LearnedContract check_learned(const LearnedTangentArguments& a);

struct FollowContract {
  core::DType dtype;
  c10::SymInt channels;
  int32_t rule;
  core::Grid grid;
  core::HistogramLayout layout;
  // Of the ops that also quantize:
  core::Rounding rounding;
  core::Mask mask;
};
FollowContract check_follow(const char* op, const FollowArguments& a);

struct Observed {
  core::DType dtype;
  core::Statistic into;
};
Observed check_observe(const at::Tensor& x, const at::Tensor& extrema, const at::Tensor& tally,
                       const at::Tensor& counts, int64_t ch_axis);

struct Merged {
  core::Statistic into, from;
};
Merged check_merge(const at::Tensor& extrema, const at::Tensor& tally, const at::Tensor& counts,
                   const at::Tensor& other_extrema, const at::Tensor& other_tally,
                   const at::Tensor& other_counts);

struct SolveContract {
  int32_t rule;
  core::Grid grid;
  core::Statistic statistic;
  const double* options;
};
SolveContract check_solve(const SolveArguments& a);
// One for each quantizer.
std::vector<SolveContract> check_solve_many(const SolveManyArguments& a);

core::Grid check_qparams(const at::Tensor& range, c10::string_view grid,
                         const std::optional<at::Tensor>& tensor_scale);

observers::KlVariant check_kl_threshold(const at::Tensor& counts, const at::Tensor& bin_width,
                                        int64_t levels, c10::string_view variant);

struct GptqContract {
  core::DType dtype;
  core::Codes codes;
  core::Rounding rounding;
};
GptqContract check_gptq(const at::Tensor& weight, const at::Tensor& factor, const at::Tensor& scale,
                        const at::Tensor& zero_point, c10::string_view grid);

// The arguments of a rule's one-shot op, which depend on its options.
struct OneShot {
  at::Tensor x;
  int64_t ch_axis;
  c10::SymInt channels;
  int32_t rule;
  core::Grid grid;
  std::vector<double> options;

  core::HistogramLayout layout() const {
    return ch_axis < 0 ? core::kPerTensor : core::kPerChannel;
  }
};
OneShot check_one_shot(const c10::OperatorHandle& handle, const torch::jit::Stack& stack);

}  // namespace torch_ext::bindings
