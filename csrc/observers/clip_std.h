#pragma once

#include "core/contract.h"
#include "core/lattice.h"

namespace torch_ext::observers {

// Mean plus and minus std_scale standard deviations, clamped to the range of the data.
struct ClipStd {
  static constexpr const char* name = "clip_std";
  static constexpr core::Needs needs = core::Needs::moments;
  static constexpr int max_bits = 16;
  static constexpr core::Option options[] = {{"std_scale", 3, 0x1p-126, 0x1p111}};
  static constexpr int32_t option_count = 1;

  TE_HD static double mean(const core::View& view) {
    return view.sum / static_cast<double>(view.finite);
  }
  // Unbiased standard deviation (N-1); 0 for one value.
  TE_HD static double deviation(const core::View& view, double mean) {
    if (view.finite < 2) return 0;
    return __builtin_sqrt(core::squared_deviation(view, mean) /
                          static_cast<double>(view.finite - 1));
  }
  TE_HD static core::Range around(const core::View& view, double mean, double reach) {
    return {core::clamp(mean - reach, view.min, view.max),
            core::clamp(mean + reach, view.min, view.max)};
  }

  TE_HD static core::Range solve(const core::View& view, const core::Grid&, const double* options) {
    if (view.finite == 1) return {view.min, view.max};
    const double mu = mean(view);
    // A value counts as the lower edge of its bin, so the mean of few values can be below all of
    // them.
    const double center = core::clamp(mu, view.min, view.max);
    return around(view, center, options[0] * deviation(view, mu));
  }
};
static_assert(core::ClosedRule<ClipStd>);

}  // namespace torch_ext::observers
