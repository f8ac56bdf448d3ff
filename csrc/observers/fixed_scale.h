#pragma once

#include "core/contract.h"

namespace torch_ext::observers {

// Scale and zero point are options, and the range is what they represent. Nothing is observed.
struct FixedScale {
  static constexpr const char* name = "fixed_scale";
  static constexpr core::Needs needs = core::Needs::nothing;
  static constexpr int max_bits = 16;
  // With a scale of up to 2^111 every code of a 16-bit grid is finite in float32.
  static constexpr core::Option options[] = {{"scale", 1, 0x1p-126, 0x1p111},
                                             {"zero_point", 0, -32768, 65535}};
  static constexpr int32_t option_count = 2;

  TE_HD static core::Complaint complaint(const core::Grid& grid, core::HistogramLayout,
                                         const double* options) {
    const double zero_point = options[1];
    if (zero_point != __builtin_floor(zero_point)) return {"zero_point", "an integer", zero_point};
    if (zero_point < grid.quant_min || zero_point > grid.quant_max)
      return {"zero_point", "between quant_min and quant_max", zero_point};
    if (grid.symmetric && zero_point != 0)
      return {"zero_point", "0 on a symmetric grid", zero_point};
    return {};
  }
  TE_HD static core::QParams qparams(const core::Grid&, const double* options) {
    return {static_cast<float>(options[0]), static_cast<int32_t>(options[1])};
  }
  TE_HD static core::Range solve(const core::View&, const core::Grid& grid, const double* options) {
    const core::QParams q = qparams(grid, options);
    const double scale = static_cast<double>(q.scale);
    return {scale * (grid.lowest() - q.zero_point), scale * (grid.highest() - q.zero_point)};
  }
};
static_assert(core::ClosedRule<FixedScale> && core::GivesQParams<FixedScale>);

}  // namespace torch_ext::observers
