#include "bindings/checks.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings/grid_text.h"
#include "cuda/driver.h"
#include "rule_table.h"

namespace torch_ext::bindings {
namespace {

void check_same_device(const char* op, const std::string& argument, const at::Tensor& t,
                       const at::Device& device) {
  expect(t.device() == device, op, argument.c_str(), device, t.device());
}

template <class T>
T* values_of(const at::Tensor& t, Access access) {
  return access == Access::write ? t.mutable_data_ptr<T>() : const_cast<T*>(t.const_data_ptr<T>());
}

}  // namespace

void check_device(const char* op, const char* argument, const at::Tensor& t) {
  const bool reachable = t.is_cpu() || t.is_meta() || (t.is_cuda() && cuda::available());
  expect(reachable, op, argument,
         cuda::available() ? "on the CPU or a CUDA device"
                           : "on the CPU (a build without CUDA kernels)",
         t.device());
  expect(t.layout() == at::kStrided, op, argument, "a strided tensor", t.layout());
}

core::DType dtype_of(const at::Tensor& x) {
  const at::ScalarType type = x.scalar_type();
  return type == at::kDouble     ? core::DType::f64
         : type == at::kHalf     ? core::DType::f16
         : type == at::kBFloat16 ? core::DType::bf16
                                 : core::DType::f32;
}

core::DType check_data(const char* op, const char* argument, const at::Tensor& x) {
  check_device(op, argument, x);
  const at::ScalarType type = x.scalar_type();
  expect(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16,
         op, argument, "float32, float64, float16 or bfloat16", type);
  return dtype_of(x);
}

c10::SymInt check_axis(const char* op, const at::Tensor& x, int64_t ch_axis) {
  const bool valid = ch_axis >= -1 && ch_axis < x.dim();
  if (!valid)
    expect(false, op, "ch_axis",
           "-1 or an axis of the " + std::to_string(x.dim()) + "-dimensional x", ch_axis);
  return ch_axis < 0 ? c10::SymInt(1) : x.sym_size(ch_axis);
}

void check_order(const char* op, at::IntArrayRef order, const at::Tensor& x) {
  if (order.empty()) return;
  std::vector<int64_t> sorted = order.vec();
  std::sort(sorted.begin(), sorted.end());
  bool all = static_cast<int64_t>(sorted.size()) == x.dim();
  for (size_t d = 0; all && d < sorted.size(); ++d) all = sorted[d] == static_cast<int64_t>(d);
  expect(all, op, "order", c10::str("empty or the ", x.dim(), " axes"), order);
}

core::HistogramLayout check_layout(const char* op, int64_t mantissa_bits, int64_t octaves) {
  if (octaves != 0) {
    expect(mantissa_bits >= 5 && mantissa_bits <= 10, op, "mantissa_bits", "between 5 and 10",
           mantissa_bits);
    expect(octaves >= 4 && octaves <= 32, op, "octaves", "between 4 and 32", octaves);
  }
  return {static_cast<int32_t>(mantissa_bits), static_cast<int32_t>(octaves)};
}

core::Statistic check_statistic(const char* op, Access access, const at::Tensor& extrema,
                                const at::Tensor& tally, const at::Tensor& counts,
                                const std::optional<c10::SymInt>& channels, const char* prefix) {
  const auto name = [&](const char* part) { return std::string(prefix) + part; };
  const auto check = [&](const at::Tensor& t, const char* part, at::ScalarType type) {
    check_device(op, name(part).c_str(), t);
    check_same_device(op, name(part), t, extrema.device());
    expect(t.scalar_type() == type, op, name(part).c_str(), type, t.scalar_type());
    expect(t.is_contiguous(), op, name(part).c_str(), "contiguous", "strides ", t.sym_strides());
  };
  check(extrema, "extrema", at::kFloat);
  check(tally, "tally", at::kLong);
  check(counts, "counts", at::kLong);
  expect(extrema.dim() == 2 && holds(extrema.sym_size(1).sym_eq(2)), op, name("extrema").c_str(),
         "of shape [C, 2]", extrema.sym_sizes());
  const c10::SymInt rows = extrema.sym_size(0);
  if (channels && !holds(rows.sym_eq(*channels)))
    expect(false, op, name("extrema").c_str(), c10::str("of shape [", *channels, ", 2]"),
           extrema.sym_sizes());
  if (!(tally.dim() == 2 && holds(tally.sym_size(0).sym_eq(rows)) &&
        holds(tally.sym_size(1).sym_eq(core::kTallyColumns))))
    expect(false, op, name("tally").c_str(), c10::str("of shape [", rows, ", 5]"),
           tally.sym_sizes());
  const bool is_counts = counts.dim() == 4 && holds(counts.sym_size(0).sym_eq(rows)) &&
                         holds(counts.sym_size(1).sym_eq(2));
  // The layout of a histogram is part of the graph.
  const auto fixed = [&](int64_t d) { return counts.sym_size(d).guard_int(__FILE__, __LINE__); };
  const int64_t octaves = is_counts ? fixed(2) : 0, bins = is_counts ? fixed(3) : 0;
  int64_t mantissa_bits = 0;
  while ((int64_t{1} << mantissa_bits) < bins) ++mantissa_bits;
  const bool has_none = octaves == 0 && bins == 0;
  const bool has_histogram = octaves >= 4 && octaves <= 32 && mantissa_bits >= 5 &&
                             mantissa_bits <= 10 && bins == int64_t{1} << mantissa_bits;
  if (!is_counts || !(has_none || has_histogram))
    expect(false, op, name("counts").c_str(),
           c10::str("of shape [", rows, ", 2, octaves (4 to 32), 2^mantissa_bits (5 to 10)] or [",
                    rows, ", 2, 0, 0]"),
           counts.sym_sizes());
  const core::HistogramLayout layout{static_cast<int32_t>(mantissa_bits),
                                     static_cast<int32_t>(octaves)};
  if (extrema.is_meta()) return {nullptr, nullptr, nullptr, 0, layout};
  return {values_of<float>(extrema, access), values_of<int64_t>(tally, access),
          has_none ? nullptr : values_of<int64_t>(counts, access), rows.expect_int(), layout};
}

void check_range(const char* op, const at::Tensor& range,
                 const std::optional<c10::SymInt>& channels, const at::Device& device) {
  check_device(op, "range", range);
  check_same_device(op, "range", range, device);
  expect(range.scalar_type() == at::kFloat, op, "range", "Float", range.scalar_type());
  if (range.dim() != 2 || !holds(range.sym_size(1).sym_eq(2)) ||
      (channels && !holds(range.sym_size(0).sym_eq(*channels))))
    expect(false, op, "range",
           channels ? c10::str("of shape [", *channels, ", 2]") : std::string("of shape [C, 2]"),
           range.sym_sizes());
  expect(range.is_contiguous(), op, "range", "contiguous", "strides ", range.sym_strides());
}

void check_per_channel(const char* op, const char* argument, const at::Tensor& t,
                       at::ScalarType type, const c10::SymInt& channels, const at::Device& device) {
  check_device(op, argument, t);
  check_same_device(op, argument, t, device);
  expect(t.scalar_type() == type, op, argument, type, t.scalar_type());
  if (t.dim() > 1 || !holds(t.sym_numel().sym_eq(channels)))
    expect(false, op, argument, c10::str("of shape [", channels, "]"), t.sym_sizes());
  expect(t.is_contiguous(), op, argument, "contiguous", "strides ", t.sym_strides());
}

void check_like(const char* op, const char* argument, const at::Tensor& t, const at::Tensor& x) {
  check_device(op, argument, t);
  check_same_device(op, argument, t, x.device());
  bool same = t.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = holds(t.sym_size(d).sym_eq(x.sym_size(d)));
  expect(same, op, argument, x.sym_sizes(), t.sym_sizes());
  expect(t.scalar_type() == x.scalar_type(), op, argument, x.scalar_type(), t.scalar_type());
}

const FakeQuantRow& check_method(std::string_view name) {
  std::string known;
  for (const FakeQuantRow& row : fake_quants()) {
    if (row.learned < 0) continue;
    if (name == row.name) return row;
    known += (known.empty() ? "" : ", ") + std::string(row.name);
  }
  expect(false, "learned_fake_quant", "method", "one of " + known, '"', name, '"');
  return fake_quants()[0];
}

int32_t check_rule(const char* op, std::string_view name) {
  for (size_t i = 0; i < rules().size(); ++i)
    if (name == rules()[i].name) return static_cast<int32_t>(i);
  TORCH_CHECK(false, op, ": unknown observer \"", name, "\"; known: ", known_rules());
}

std::string known_rules() {
  std::string known;
  for (const RuleRow& rule : rules()) {
    if (!known.empty()) known += ", ";
    known += rule.name;
  }
  return known;
}

int64_t option_count_of(int32_t rule) { return static_cast<int64_t>(rules()[rule].options.size()); }

core::Needs needs_of(int32_t rule) { return rules()[rule].needs; }

void check_rule_use(const char* op, int32_t index, const core::Grid& grid,
                    core::HistogramLayout layout, const double* options, int64_t option_count) {
  const RuleRow& rule = rules()[index];
  if (grid.is_float() && rule.only_integers != nullptr)
    TORCH_CHECK(false, op, ": expected the grid to be of integers for ", rule.name, " (",
                rule.only_integers, "), got ", name_of(grid.format));
  if (grid.bits() > rule.max_bits)
    TORCH_CHECK(false, op, ": expected the grid to be of at most ", rule.max_bits, " bits for ",
                rule.name, " (beyond that there is nothing to search), got [", grid.quant_min, ", ",
                grid.quant_max, "]");
  if (option_count != static_cast<int64_t>(rule.options.size()))
    expect(false, op, "options",
           std::to_string(rule.options.size()) + " values for " + std::string(rule.name),
           option_count);
  for (size_t i = 0; i < rule.options.size(); ++i) {
    const core::Option& option = rule.options[i];
    const bool whole = option.choices == nullptr || options[i] == std::floor(options[i]);
    if (!(options[i] >= option.minimum && options[i] <= option.maximum && whole))
      expect(false, op, option.name, c10::str("between ", option.minimum, " and ", option.maximum),
             options[i]);
  }
  if (rule.complaint != nullptr) {
    const core::Complaint complaint = rule.complaint(grid, layout, options);
    if (complaint.want != nullptr)
      expect(false, op, complaint.argument, complaint.want, complaint.have);
  }
  if (rule.needs >= core::Needs::counts && layout.octaves == 0)
    expect(false, op, "counts", "kept for " + std::string(rule.name) + ", which reads a histogram",
           "none");
}

core::TensorView view_of(const at::Tensor& x, core::DType dtype) {
  return {x.const_data_ptr(), dtype, static_cast<int32_t>(x.dim()), x.sizes().data(),
          x.strides().data()};
}

}  // namespace torch_ext::bindings
