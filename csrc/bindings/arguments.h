#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

// The ops with long argument lists. A list is written here as a struct, which the kernels take, and
// as a function type, from which the dispatcher infers the schema of a kernel. The order is that of
// schema.cpp; registration fails where the types differ from the schema.
namespace torch_ext::bindings {

struct FakeQuantArguments {
  const at::Tensor& x;
  const at::Tensor& scale;
  const at::Tensor& zero_point;
  c10::string_view grid;  // as everywhere, a text (grid_text.h)
  int64_t ch_axis;
  c10::string_view mask;
  // Of _fake_quant_forward: the axes in the order of memory (layout.h) that out and mask have.
  at::IntArrayRef order = {};
};
template <class Result, class... Order>
using FakeQuantSignature = Result(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                  c10::string_view, int64_t, c10::string_view, Order...);

struct FakeQuantOp {
  static constexpr const char* name = "torch_ext::fake_quant";
  using Arguments = FakeQuantArguments;
  using Signature = FakeQuantSignature<at::Tensor>;
};
struct FakeQuantForwardOp {
  static constexpr const char* name = "torch_ext::_fake_quant_forward";
  using Arguments = FakeQuantArguments;
  using Signature = FakeQuantSignature<std::tuple<at::Tensor, at::Tensor>, at::IntArrayRef>;
};

struct DynamicArguments {
  const at::Tensor& x;
  int64_t group_size;  // -1: the whole last axis
  c10::string_view grid;
  const std::optional<at::Tensor>& tensor_scale;
  // Of _dynamic_fake_quant_forward: the order that out has, and by its last axis the mask
  // (layout.h).
  at::IntArrayRef order = {};
};
template <class Result, class... Order>
using DynamicSignature = Result(const at::Tensor&, int64_t, c10::string_view,
                                const std::optional<at::Tensor>&, Order...);

struct DynamicOp {
  static constexpr const char* name = "torch_ext::dynamic_fake_quant";
  using Arguments = DynamicArguments;
  using Signature = DynamicSignature<at::Tensor>;
};
struct DynamicForwardOp {
  static constexpr const char* name = "torch_ext::_dynamic_fake_quant_forward";
  using Arguments = DynamicArguments;
  using Signature = DynamicSignature<std::tuple<at::Tensor, at::Tensor>, at::IntArrayRef>;
};

struct LearnedArguments {
  const at::Tensor& x;
  c10::string_view method;
  const at::Tensor& parameter;
  const std::optional<at::Tensor>& zero_point;
  c10::string_view grid;
  int64_t ch_axis;
  bool use_grad_scaling;
  int64_t batch_axis;
};
struct LearnedBackwardArguments {
  const at::Tensor& grad;
  LearnedArguments forward;
  // Which gradients are wanted; the others come back without elements.
  bool of_x;
  bool of_parameters;
};
struct LearnedTangentArguments {
  const std::optional<at::Tensor>& x_tangent;
  const std::optional<at::Tensor>& parameter_tangent;
  const std::optional<at::Tensor>& zero_point_tangent;
  const std::optional<at::Tensor>& mixed_tangent;
  LearnedArguments forward;
};
// Leading: the types of the arguments in front of x.
template <class Result, class... Leading>
using LearnedSignature = Result(Leading..., const at::Tensor&, c10::string_view, const at::Tensor&,
                                const std::optional<at::Tensor>&, c10::string_view, int64_t, bool,
                                int64_t);
// Base, with arguments after its own.
template <class Base, class... Trailing>
struct Extended;
template <class Result, class... Types, class... Trailing>
struct Extended<Result(Types...), Trailing...> {
  using type = Result(Types..., Trailing...);
};

struct LearnedOp {
  static constexpr const char* name = "torch_ext::learned_fake_quant";
  using Arguments = LearnedArguments;
  using Signature = LearnedSignature<at::Tensor>;
};
struct LearnedBackwardOp {
  static constexpr const char* name = "torch_ext::_learned_fake_quant_backward";
  using Arguments = LearnedBackwardArguments;
  using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  using Signature = Extended<LearnedSignature<Gradients, const at::Tensor&>, bool, bool>::type;
};
struct LearnedTangentOp {
  static constexpr const char* name = "torch_ext::_learned_fake_quant_tangent";
  using Arguments = LearnedTangentArguments;
  using Tangent = const std::optional<at::Tensor>&;
  using Signature = LearnedSignature<at::Tensor, Tangent, Tangent, Tangent, Tangent>;
};

struct FollowArguments {
  const at::Tensor& x;
  const at::Tensor& range;
  const at::Tensor& scale;
  const at::Tensor& zero_point;
  const at::Tensor& solved;
  double averaging_constant;
  c10::string_view rule;
  c10::string_view grid;
  at::ArrayRef<double> options;
  int64_t ch_axis;
  int64_t mantissa_bits;
  int64_t octaves;
  // Of the ops that also quantize:
  c10::string_view mask = "rounded";
  bool with_mask = false;
  at::IntArrayRef order = {};  // as in FakeQuantArguments
};
// Quantize: the types of the arguments from `mask` on.
template <class Result, class... Quantize>
using FollowSignature = Result(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const at::Tensor&, const at::Tensor&, double, c10::string_view,
                               c10::string_view, at::ArrayRef<double>, int64_t, int64_t, int64_t,
                               Quantize...);

struct FollowOp {
  static constexpr const char* name = "torch_ext::follow_";
  using Arguments = FollowArguments;
  using Signature = FollowSignature<void>;
};
struct FollowFakeQuantOp {
  static constexpr const char* name = "torch_ext::follow_fake_quant";
  using Arguments = FollowArguments;
  using Signature = FollowSignature<at::Tensor, c10::string_view>;
};
struct FollowForwardOp {
  static constexpr const char* name = "torch_ext::_follow_fake_quant_forward";
  using Arguments = FollowArguments;
  using Signature =
      FollowSignature<std::tuple<at::Tensor, at::Tensor>, c10::string_view, bool, at::IntArrayRef>;
};

struct SolveArguments {
  c10::string_view rule;
  const at::Tensor& extrema;
  const at::Tensor& tally;
  const at::Tensor& counts;
  c10::string_view grid;
  at::ArrayRef<double> options;
};
struct SolveOp {
  static constexpr const char* name = "torch_ext::solve";
  using Arguments = SolveArguments;
  using Signature = at::Tensor(c10::string_view, const at::Tensor&, const at::Tensor&,
                               const at::Tensor&, c10::string_view, at::ArrayRef<double>);
};

struct SolveManyArguments {
  const std::vector<std::string>& rules;
  at::TensorList extrema;
  at::TensorList tally;
  at::TensorList counts;
  const std::vector<std::string>& grids;
  at::ArrayRef<double> options;  // of all rules, one after the other
};
struct SolveManyOp {
  static constexpr const char* name = "torch_ext::solve_many";
  using Arguments = SolveManyArguments;
  using Tensors = std::vector<at::Tensor>;
  using Signature = std::tuple<Tensors, Tensors, Tensors>(const std::vector<std::string>&,
                                                          at::TensorList, at::TensorList,
                                                          at::TensorList,
                                                          const std::vector<std::string>&,
                                                          at::ArrayRef<double>);
};

// A function of the op's signature that calls `body` with the op's struct of arguments.
template <class Op, auto body, class Signature = typename Op::Signature>
struct Kernel;
template <class Op, auto body, class Result, class... Types>
struct Kernel<Op, body, Result(Types...)> {
  static Result call(Types... arguments) { return body(typename Op::Arguments{arguments...}); }
};

// Registers `body` as the kernel of an op.
template <class Op, auto body>
void impl(torch::Library& m) {
  m.impl(Op::name, TORCH_FN((Kernel<Op, body>::call)));
}

// Calls an op through the dispatcher, with all arguments in the order of its schema.
template <class Op, class... Arguments>
auto call_op(const Arguments&... arguments) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow(Op::name, "")
                                 .template typed<typename Op::Signature>();
  return handle.call(arguments...);
}

// The same of a learned fake-quant. Leading: the arguments in front of x.
template <class Op, class... Leading>
auto call_learned(const LearnedArguments& a, const Leading&... leading) {
  return call_op<Op>(leading..., a.x, a.method, a.parameter, a.zero_point, a.grid, a.ch_axis,
                     a.use_grad_scaling, a.batch_axis);
}

}  // namespace torch_ext::bindings
