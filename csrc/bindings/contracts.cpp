#include "bindings/contracts.h"

#include <algorithm>
#include <cmath>

#include "bindings/autograd.h"
#include "bindings/grid_text.h"
#include "core/qparams.h"
#include "cpu/subnormals.h"

namespace torch_ext::bindings {

// ---- fake-quant

namespace {

// The CPU raises for values that no quantizer can have. On CUDA reading them would wait for the
// device, so there the output becomes NaN instead.
void check_zero_points(const char* op, const at::Tensor& zero_point, const core::Codes& codes) {
  if (!zero_point.is_cpu()) return;
  const int32_t* const values = zero_point.const_data_ptr<int32_t>();
  for (int64_t c = 0; c < zero_point.numel(); ++c)
    expect(codes.has_zero_point(values[c]), op, "zero_point",
           codes.is_float() ? "0 on a float format" : "between quant_min and quant_max", values[c],
           " in channel ", c);
}

void check_scales(const char* op, const at::Tensor& scale) {
  if (!scale.is_cpu()) return;
  const cpu::KeepSubnormals keep;
  const float* const values = scale.const_data_ptr<float>();
  for (int64_t c = 0; c < scale.numel(); ++c)
    expect(core::is_valid_scale(values[c]), op, "scale", "positive and finite", values[c],
           " in channel ", c);
}

core::Mask parse_mask(const char* op, std::string_view name) {
  if (name == "rounded") return core::Mask::rounded;
  expect(name == "paper", op, "mask", "one of rounded, paper", name);
  return core::Mask::paper;
}

// On CUDA reading the values would wait for the device: there the output becomes NaN instead.
void check_finite(const char* op, const char* argument, const at::Tensor& t) {
  if (!t.is_cpu()) return;
  const float* const values = t.const_data_ptr<float>();
  for (int64_t c = 0; c < t.numel(); ++c)
    expect(std::isfinite(values[c]), op, argument, "finite", values[c], " in channel ", c);
}

}  // namespace

FakeQuantContract check_fake_quant(const char* op, const FakeQuantArguments& a) {
  const core::DType dtype = check_data(op, "x", a.x);
  const c10::SymInt channels = check_axis(op, a.x, a.ch_axis);
  check_per_channel(op, "scale", a.scale, at::kFloat, channels, a.x.device());
  check_per_channel(op, "zero_point", a.zero_point, at::kInt, channels, a.x.device());
  const QuantizingGrid grid = check_quantizing_grid({op, text(a.grid)});
  check_order(op, a.order, a.x);
  const core::Mask mask = parse_mask(op, text(a.mask));
  check_scales(op, a.scale);
  check_zero_points(op, a.zero_point, grid.codes);
  return {dtype, grid.codes, grid.rounding, mask};
}

core::DType check_fake_quant_backward(const at::Tensor& grad, const at::Tensor& mask,
                                      at::IntArrayRef order) {
  constexpr const char* op = "_fake_quant_backward";
  const core::DType dtype = check_data(op, "grad", grad);
  check_per_channel(op, "mask", mask, at::kByte, (grad.sym_numel() + 7) / 8, grad.device());
  check_order(op, order, grad);
  return dtype;
}

namespace {

// The scale of the whole tensor, which is there if the grid has one. On CUDA reading its value
// would wait for the device: there the output becomes NaN instead.
void check_tensor_scale(const char* op, const std::optional<at::Tensor>& t, const core::Grid& grid,
                        const at::Device& device) {
  if (!grid.has_tensor_scale())
    return expect(!t, op, "tensor_scale", "None, as the grid has no scale_dtype", "a tensor");
  expect(t.has_value(), op, "tensor_scale", "Float of shape [1], as the grid has a scale_dtype",
         "None");
  check_per_channel(op, "tensor_scale", *t, at::kFloat, 1, device);
  if (!t->is_cpu()) return;
  const cpu::KeepSubnormals keep;
  const float value = *t->const_data_ptr<float>();
  const core::Range valid = core::tensor_scales(grid);
  expect(core::is_tensor_scale(value, grid), op, "tensor_scale",
         c10::str("between ", valid.lo, " and ", valid.hi), value);
}

// Raises for a grid whose scales need one of the whole tensor, which the op does not take.
void refuse_tensor_scale(const char* op, const core::Grid& grid) {
  expect(!grid.has_tensor_scale(), op, "grid",
         "without scale_dtype, as the op takes no tensor_scale",
         std::string("scale_dtype=") + (grid.has_tensor_scale() ? name_of(grid.scale_format) : ""));
}
// The same for a rule that tries scales out.
void refuse_tensor_scale(const char* op, const core::Grid& grid, int32_t rule) {
  if (rules()[rule].search_words != nullptr || rules()[rule].composite)
    refuse_tensor_scale(op, grid);
}

}  // namespace

DynamicContract check_dynamic(const DynamicArguments& a) {
  constexpr const char* op = "dynamic_fake_quant";
  const core::DType dtype = check_data(op, "x", a.x);
  expect(a.x.dim() >= 1, op, "x", "of one axis or more, along the last of which groups lie",
         "a scalar");
  const c10::SymInt length = a.x.sym_size(-1);
  if (a.group_size != -1) {
    expect(a.group_size >= 1, op, "group_size", "-1 (the whole last axis) or at least 1",
           a.group_size);
    if (!holds((length % a.group_size).sym_eq(0)))
      expect(false, op, "group_size", c10::str("a divisor of the last axis, ", length),
             a.group_size);
  }
  const SolvingGrid grid = check_solving_grid({op, text(a.grid)});
  check_tensor_scale(op, a.tensor_scale, grid.grid, a.x.device());
  check_order(op, a.order, a.x);
  return {dtype, a.group_size == -1 ? length : c10::SymInt(a.group_size), grid.grid, grid.rounding};
}

// ---- learned fake-quants

LearnedContract check_learned(const LearnedArguments& a) {
  const FakeQuantRow& row = check_method(text(a.method));
  const char* const op = row.name;
  const core::DType dtype = check_data(op, "x", a.x);
  const c10::SymInt channels = check_axis(op, a.x, a.ch_axis);
  expect(row.per_channel || a.ch_axis == -1, op, "ch_axis", "-1, as there is one parameter",
         a.ch_axis);
  check_per_channel(op, row.parameter, a.parameter, at::kFloat, channels, a.x.device());
  const bool learned = a.zero_point && a.zero_point->scalar_type() == at::kFloat;
  expect(row.per_channel || !a.zero_point, op, "zero_point",
         "None, as the method has no zero point", "a tensor");
  if (a.zero_point)
    check_per_channel(op, "zero_point", *a.zero_point, learned ? at::kFloat : at::kInt, channels,
                      a.x.device());
  const core::Codes codes = check_learned_grid({op, text(a.grid)});
  expect(!learned || !codes.is_float(), op, "zero_point", "Int on a float format, which has none",
         "Float");
  expect(a.batch_axis >= -1 && a.batch_axis < std::max<int64_t>(a.x.dim(), 1), op, "batch_axis",
         "-1 or an axis of x", a.batch_axis);
  expect(a.batch_axis < 0 || a.batch_axis != a.ch_axis, op, "batch_axis",
         "another axis than ch_axis", a.batch_axis);
  check_finite(op, row.parameter, a.parameter);
  if (learned)
    check_finite(op, "zero_point", *a.zero_point);
  else if (a.zero_point)
    check_zero_points(op, *a.zero_point, codes);
  return {row, dtype, codes, learned};
}

LearnedContract check_learned(const LearnedBackwardArguments& a) {
  const LearnedContract contract = check_learned(a.forward);
  check_like(contract.row.name, "grad", a.grad, a.forward.x);
  return contract;
}

LearnedContract check_learned(const LearnedTangentArguments& a) {
  const LearnedContract contract = check_learned(a.forward);
  const char* const op = contract.row.name;
  if (a.x_tangent) check_like(op, "x_tangent", *a.x_tangent, a.forward.x);
  const auto check = [&](const char* argument, const std::optional<at::Tensor>& t) {
    if (t)
      check_per_channel(op, argument, *t, at::kFloat, a.forward.parameter.sym_numel(),
                        a.forward.x.device());
  };
  check("parameter_tangent", a.parameter_tangent);
  check("zero_point_tangent", a.zero_point_tangent);
  check("mixed_tangent", a.mixed_tangent);
  return contract;
}

// ---- statistics

FollowContract check_follow(const char* op, const FollowArguments& a) {
  const at::Device device = a.x.device();
  FollowContract contract{};
  contract.dtype = check_data(op, "x", a.x);
  contract.channels = check_axis(op, a.x, a.ch_axis);
  check_range(op, a.range, contract.channels, device);
  check_per_channel(op, "scale", a.scale, at::kFloat, contract.channels, device);
  check_per_channel(op, "zero_point", a.zero_point, at::kInt, contract.channels, device);
  check_per_channel(op, "solved", a.solved, at::kByte, 1, device);
  check_order(op, a.order, a.x);
  expect(a.averaging_constant >= 0 && a.averaging_constant <= 1, op, "averaging_constant",
         "between 0 and 1", a.averaging_constant);
  contract.rule = check_rule(op, text(a.rule));
  const SolvingGrid grid = check_solving_grid({op, text(a.grid)});
  refuse_tensor_scale(op, grid.grid);
  contract.grid = grid.grid;
  contract.rounding = grid.rounding;
  contract.mask = parse_mask(op, text(a.mask));
  contract.layout = check_layout(op, a.mantissa_bits, a.octaves);
  check_rule_use(op, contract.rule, contract.grid, contract.layout, a.options.data(),
                 static_cast<int64_t>(a.options.size()));
  return contract;
}

Observed check_observe(const at::Tensor& x, const at::Tensor& extrema, const at::Tensor& tally,
                       const at::Tensor& counts, int64_t ch_axis) {
  constexpr const char* op = "observe_";
  const core::DType dtype = check_data(op, "x", x);
  const c10::SymInt channels = check_axis(op, x, ch_axis);
  const core::Statistic into = check_statistic(op, Access::write, extrema, tally, counts, channels);
  expect(extrema.device() == x.device(), op, "extrema", x.device(), extrema.device());
  return {dtype, into};
}

Merged check_merge(const at::Tensor& extrema, const at::Tensor& tally, const at::Tensor& counts,
                   const at::Tensor& other_extrema, const at::Tensor& other_tally,
                   const at::Tensor& other_counts) {
  constexpr const char* op = "merge_";
  const core::Statistic into =
      check_statistic(op, Access::write, extrema, tally, counts, std::nullopt);
  const core::Statistic from = check_statistic(op, Access::read, other_extrema, other_tally,
                                               other_counts, extrema.sym_size(0), "other_");
  expect(other_extrema.device() == extrema.device(), op, "other_extrema", extrema.device(),
         other_extrema.device());
  expect(from.layout.octaves == into.layout.octaves &&
             from.layout.mantissa_bits == into.layout.mantissa_bits,
         op, "other_counts", counts.sym_sizes(), other_counts.sym_sizes());
  return {into, from};
}

SolveContract check_solve(const SolveArguments& a) {
  constexpr const char* op = "solve";
  const int32_t rule = check_rule(op, text(a.rule));
  const core::Statistic statistic =
      check_statistic(op, Access::read, a.extrema, a.tally, a.counts, std::nullopt);
  const core::Grid grid = check_solving_grid({op, text(a.grid)}).grid;
  refuse_tensor_scale(op, grid, rule);
  check_rule_use(op, rule, grid, statistic.layout, a.options.data(),
                 static_cast<int64_t>(a.options.size()));
  return {rule, grid, statistic, a.options.data()};
}

std::vector<SolveContract> check_solve_many(const SolveManyArguments& a) {
  constexpr const char* op = "solve_many";
  const size_t n = a.rules.size();
  const auto expect_length = [&](const char* argument, size_t length) {
    if (length != n) expect(false, op, argument, "a list of " + std::to_string(n), length);
  };
  expect_length("extrema", a.extrema.size());
  expect_length("tally", a.tally.size());
  expect_length("counts", a.counts.size());
  expect_length("grids", a.grids.size());
  std::vector<SolveContract> contracts;
  size_t used = 0;
  for (size_t i = 0; i < n; ++i) {
    const int32_t rule = check_rule(op, a.rules[i]);
    const core::Statistic statistic =
        check_statistic(op, Access::read, a.extrema[i], a.tally[i], a.counts[i], std::nullopt);
    expect(a.extrema[i].device() == a.extrema[0].device(), op, "extrema", a.extrema[0].device(),
           a.extrema[i].device());
    const core::Grid grid = check_solving_grid({op, a.grids[i], static_cast<int64_t>(i)}).grid;
    refuse_tensor_scale(op, grid);
    const size_t own = static_cast<size_t>(option_count_of(rule));
    if (a.options.size() < used + own)
      expect(false, op, "options", std::to_string(used + own) + " values or more",
             a.options.size());
    check_rule_use(op, rule, grid, statistic.layout, a.options.data() + used,
                   static_cast<int64_t>(own));
    contracts.push_back({rule, grid, statistic, a.options.data() + used});
    used += own;
  }
  if (used != a.options.size())
    expect(false, op, "options", std::to_string(used) + " values", a.options.size());
  return contracts;
}

core::Grid check_qparams(const at::Tensor& range, c10::string_view grid_text,
                         const std::optional<at::Tensor>& tensor_scale) {
  constexpr const char* op = "qparams";
  check_range(op, range, std::nullopt, range.device());
  const core::Grid grid = check_solving_grid({op, text(grid_text)}).grid;
  check_tensor_scale(op, tensor_scale, grid, range.device());
  expect(!tensor_scale || !differentiates(*tensor_scale), op, "tensor_scale", "a constant",
         "one that requires a gradient; detach it");
  return grid;
}

// ---- rules of one tensor

namespace {

observers::KlVariant parse_variant(const char* op, std::string_view name) {
  // In the order of KlVariant, without its first, log_linear: that searches a statistic, not a
  // histogram.
  constexpr const char* names[] = {"slides", "modelopt", "ncnn", "tvm", "onnxruntime", "horizon"};
  int32_t variant = 1;
  for (const char* known : names) {
    if (name == known) return static_cast<observers::KlVariant>(variant);
    ++variant;
  }
  expect(false, op, "variant", "one of slides, modelopt, ncnn, tvm, onnxruntime, horizon", name);
  return observers::KlVariant::slides;
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

}  // namespace

observers::KlVariant check_kl_threshold(const at::Tensor& counts, const at::Tensor& bin_width,
                                        int64_t levels, c10::string_view variant_name) {
  constexpr const char* op = "kl_threshold";
  const observers::KlVariant variant = parse_variant(op, text(variant_name));
  check_device(op, "counts", counts);
  expect(counts.scalar_type() == at::kLong, op, "counts", "Long", counts.scalar_type());
  expect(counts.dim() == 2 && holds(counts.sym_size(1).sym_ge(1)) &&
             holds(counts.sym_size(1).sym_le(1 << 20)),
         op, "counts", "of shape [N, B] with 1 to 2^20 bins", counts.sym_sizes());
  expect(levels >= 2 && levels <= 65536, op, "levels", "between 2 and 65536", levels);
  expect(holds(counts.sym_size(1).sym_ge(levels)), op, "levels", "at most the bins of counts",
         levels, " for ", counts.sym_size(1), " bins");
  check_per_channel(op, "bin_width", bin_width, at::kDouble, counts.sym_size(0), counts.device());
  return variant;
}

GptqContract check_gptq(const at::Tensor& weight, const at::Tensor& factor, const at::Tensor& scale,
                        const at::Tensor& zero_point, c10::string_view grid_text) {
  constexpr const char* op = "gptq";
  const core::DType dtype = check_data(op, "weight", weight);
  expect(dtype == core::DType::f32 || dtype == core::DType::f64, op, "weight", "Float or Double",
         weight.scalar_type());
  expect(weight.dim() == 3, op, "weight", "of shape [groups, rows, inputs]", weight.sym_sizes());
  const auto check = [&](const char* argument, const at::Tensor& t, at::ScalarType type,
                         const c10::SymInt& rows) {
    check_device(op, argument, t);
    expect(t.device() == weight.device(), op, argument, "on the weight's device", t.device());
    expect(t.scalar_type() == type, op, argument, type, t.scalar_type());
    expect(t.dim() == 3 && holds(t.sym_size(0).sym_eq(weight.sym_size(0))) &&
               holds(t.sym_size(1).sym_eq(rows)) && holds(t.sym_size(2).sym_eq(weight.sym_size(2))),
           op, argument,
           argument == std::string_view("factor") ? "of shape [groups, inputs, inputs]"
                                                  : "of the weight's shape",
           t.sym_sizes());
  };
  check("factor", factor, at::kDouble, weight.sym_size(2));
  check("scale", scale, at::kFloat, weight.sym_size(1));
  check("zero_point", zero_point, at::kInt, weight.sym_size(1));
  const QuantizingGrid grid = check_quantizing_grid({op, text(grid_text)});
  return {dtype, grid.codes, grid.rounding};
}

OneShot check_one_shot(const c10::OperatorHandle& handle, const torch::jit::Stack& stack) {
  const std::string name = handle.schema().name().substr(sizeof("torch_ext::") - 1);
  const char* const op = name.c_str();
  constexpr size_t kFixed = 3;
  const size_t count = handle.schema().arguments().size();
  const auto argument = [&](size_t i) -> const c10::IValue& {
    return torch::jit::peek(stack, i, count);
  };
  OneShot call{};
  call.rule = check_rule(op, name);
  call.x = argument(0).toTensor();
  check_data(op, "x", call.x);
  call.grid = check_solving_grid({op, argument(1).toStringRef()}).grid;
  refuse_tensor_scale(op, call.grid, call.rule);
  call.ch_axis = argument(2).toInt();
  call.channels = check_axis(op, call.x, call.ch_axis);
  for (const core::Option& option : rules()[call.rule].options)
    call.options.push_back(option_value(op, option, argument(kFixed + call.options.size())));
  check_rule_use(op, call.rule, call.grid, call.layout(), call.options.data(),
                 static_cast<int64_t>(call.options.size()));
  return call;
}

}  // namespace torch_ext::bindings
