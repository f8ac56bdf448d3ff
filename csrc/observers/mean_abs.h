#pragma once

#include "core/contract.h"

namespace torch_ext::observers {

// The scale 2 mean|x| / sqrt(quant_max) that learned step size starts from (Esser et al. 2020,
// arXiv 1902.08153, section 2.1); quant_max is the largest number of a float format. With many bits
// the range is wider than the data.
struct MeanAbs : core::NoOptions {
  static constexpr const char* name = "mean_abs";
  static constexpr core::Needs needs = core::Needs::moments;
  static constexpr int max_bits = 16;

  // The range that has this scale: one-sided on a symmetric unsigned grid, and on an affine grid
  // for one-sided data; else symmetric.
  TE_HD static core::Range solve(const core::View& view, const core::Grid& grid, const double*) {
    const double sum = core::magnitude_sum(view, core::kNegative, 0, view.bins) +
                       core::magnitude_sum(view, core::kPositive, 0, view.bins);
    const double levels = grid.highest() > 0 ? grid.highest() : -grid.lowest();
    const double scale = 2 * (sum / static_cast<double>(view.finite)) / __builtin_sqrt(levels);
    const double width = scale * (grid.highest() - grid.lowest());
    if (grid.symmetric && grid.is_unsigned()) return {0, view.max > 0 ? bounded(width) : 0};
    if (grid.symmetric || !view.one_sided()) return {-bounded(width / 2), bounded(width / 2)};
    return view.min >= 0 ? core::Range{0, bounded(width)} : core::Range{-bounded(width), 0};
  }

 private:
  TE_HD static double bounded(double reach) { return core::clamp(reach, 0, 0x1.fffffep127); }
};
static_assert(core::ClosedRule<MeanAbs>);

}  // namespace torch_ext::observers
