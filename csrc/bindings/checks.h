#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>

#include "core/grid.h"
#include "core/job.h"
#include "core/option.h"
#include "core/unit_grid.h"
#include "rule_table.h"

// Checks of single arguments. Sizes may be symbolic, as they are while a graph is traced: what is
// checked of them becomes a condition of the graph.
namespace torch_ext::bindings {

inline std::string_view text(c10::string_view s) { return {s.data(), s.size()}; }

// Raises `op: expected ARG to be WANT, got HAVE` unless `holds`.
template <class Want, class... Have>
void expect(bool holds, const char* op, const char* argument, const Want& want,
            const Have&... have) {
  TORCH_CHECK(holds, op, ": expected ", argument, " to be ", want, ", got ", have...);
}

// Whether a condition on sizes holds.
inline bool holds(const c10::SymBool& condition) {
  return condition.expect_true(__FILE__, __LINE__);
}

// A strided tensor on the CPU or the meta device, or on CUDA where this build has the kernels.
void check_device(const char* op, const char* argument, const at::Tensor& t);

// The element type of a tensor that passes check_device(): float32, float64, float16 or bfloat16.
core::DType check_data(const char* op, const char* argument, const at::Tensor& x);

// The same of a tensor that has been checked.
core::DType dtype_of(const at::Tensor& x);

// Number of channels of x: 1 for ch_axis -1.
c10::SymInt check_axis(const char* op, const at::Tensor& x, int64_t ch_axis);

// An order of x's axes, or empty.
void check_order(const char* op, at::IntArrayRef order, const at::Tensor& x);

// The statistic in these tensors: extrema float32 [C, 2], tally int64 [C, 5], counts int64 [C, 2,
// octaves, 2^mantissa_bits] or [C, 2, 0, 0]. C has to be `channels`, where given. `prefix` goes
// before the tensors' names in errors. On the meta device only the layout is returned. Tensors that
// are only read may be lazy clones, which stay without memory of their own.
enum class Access { read, write };
core::Statistic check_statistic(const char* op, Access access, const at::Tensor& extrema,
                                const at::Tensor& tally, const at::Tensor& counts,
                                const std::optional<c10::SymInt>& channels,
                                const char* prefix = "");

// A contiguous float32 tensor [C, 2] on this device. C has to be `channels`, where given.
void check_range(const char* op, const at::Tensor& range,
                 const std::optional<c10::SymInt>& channels, const at::Device& device);

core::HistogramLayout check_layout(const char* op, int64_t mantissa_bits, int64_t octaves);

// A contiguous tensor of this type and device, of shape [channels] ([] too for one channel).
void check_per_channel(const char* op, const char* argument, const at::Tensor& t,
                       at::ScalarType type, const c10::SymInt& channels, const at::Device& device);

// A tensor of x's shape, type and device.
void check_like(const char* op, const char* argument, const at::Tensor& t, const at::Tensor& x);

// Index of a rule in the registry. Raises for an unknown name, listing the known ones.
int32_t check_rule(const char* op, std::string_view name);

// The fake-quant method of this name, one with a learned parameter. Raises for an unknown name,
// listing the known ones.
const FakeQuantRow& check_method(std::string_view name);

// Raises unless the rule is defined for this grid, layout and option values.
void check_rule_use(const char* op, int32_t rule, const core::Grid& grid,
                    core::HistogramLayout layout, const double* options, int64_t option_count);

// Number of options of a rule; what it reads of the statistic.
int64_t option_count_of(int32_t rule);
core::Needs needs_of(int32_t rule);

// Names of all rules, comma-separated.
std::string known_rules();

core::TensorView view_of(const at::Tensor& x, core::DType dtype);

}  // namespace torch_ext::bindings
