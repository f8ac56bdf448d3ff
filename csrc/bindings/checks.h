#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string>

#include "core/affine.h"
#include "core/grid.h"
#include "core/job.h"
#include "core/option.h"
#include "rule_table.h"

// The contracts of the ops, checked once, above the device split.
namespace torch_ext::bindings {

inline std::string_view text(c10::string_view s) { return {s.data(), s.size()}; }

// A breach reads `op: expected ARG to be WANT, got HAVE`.
template <class Want, class... Have>
void expect(bool holds, const char* op, const char* argument, const Want& want,
            const Have&... have) {
  TORCH_CHECK(holds, op, ": expected ", argument, " to be ", want, ", got ", have...);
}

// A strided tensor on the CPU, or on another device this build has kernels for.
void check_device(const char* op, const char* argument, const at::Tensor& t);

// Element type of data, which is on such a device.
core::DType check_data(const char* op, const char* argument, const at::Tensor& x);

// Number of channels: 1 for ch_axis -1.
int64_t check_axis(const char* op, const at::Tensor& x, int64_t ch_axis);

// Contiguous data of x's shape as [outer, channels, inner].
core::ChannelLayout channel_layout(const at::Tensor& x, int64_t ch_axis);

// Tensors of a statistic, of `channels` channels, or of as many as they have for -1.
core::Statistic check_statistic(const char* op, const at::Tensor& extrema, const at::Tensor& tally,
                                const at::Tensor& counts, int64_t channels,
                                const char* prefix = "");

core::HistogramLayout check_layout(const char* op, int64_t mantissa_bits, int64_t octaves);

// quant_min <= 0 <= quant_max, at most 16 bits; a tvm scale only on a symmetric grid.
core::Grid check_grid(const char* op, int64_t quant_min, int64_t quant_max, bool symmetric,
                      std::string_view scale_rule, bool power_of_two);

// A contiguous tensor of this type and device with one dimension (or none) of `channels` elements.
void check_per_channel(const char* op, const char* argument, const at::Tensor& t,
                       at::ScalarType type, int64_t channels, const at::Device& device);

core::Mask parse_mask(const char* op, std::string_view name);
core::Rounding parse_rounding(const char* op, std::string_view name);

// Index of a rule in the registry. Unknown names list the known.
int32_t check_rule(const char* op, std::string_view name);

// The method of this name, which learns. Unknown names list the known.
const FakeQuantRow& check_method(std::string_view name);

// That the rule is defined on this grid and layout, with these option values.
void check_rule_use(const char* op, int32_t rule, const core::Grid& grid,
                    core::HistogramLayout layout, const double* options, int64_t option_count);

// Number of options, and what the rule reads.
int64_t option_count_of(int32_t rule);
core::Needs needs_of(int32_t rule);

// Names of all rules, comma-separated.
std::string known_rules();

core::TensorView view_of(const at::Tensor& x, core::DType dtype);

}  // namespace torch_ext::bindings
