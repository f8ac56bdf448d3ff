#pragma once

#include "observers/kl.h"
#include "observers/min_max.h"
#include "observers/mse.h"
#include "observers/percentile.h"

namespace torch_ext::observers {

// The best, by squared error on the actual grid, of four percentiles, kl and min_max; on a float
// format, for which kl is not defined, without kl.
struct Mix : core::NoOptions {
  static constexpr const char* name = "mix";
  static constexpr core::Needs needs = core::Needs::moments;
  static constexpr int max_bits = 8;

  template <class Thresholds>
  TE_HD static core::Range solve(const core::View& view, const core::Grid& grid, const double*,
                                 const Thresholds& thresholds) {
    constexpr int kCandidates = 6;
    constexpr double percentiles[] = {99.9, 99.99, 99.999, 99.9999};
    core::Range range[kCandidates];
    for (int i = 0; i < 4; ++i) range[i] = Percentile::solve(view, grid, &percentiles[i]);
    constexpr double log_linear = 0;
    range[5] = {view.min, view.max};
    range[4] = grid.is_float()
                   ? range[5]
                   : core::range_of_threshold(view, thresholds.template threshold<Kl>(&log_linear));
    double error[kCandidates], least = __builtin_inf();
    for (int i = 0; i < kCandidates; ++i) {
      error[i] = Mse::relative_error(view, grid, range[i]);
      least = error[i] < least ? error[i] : least;
    }
    // Among ties, as in a search, the smallest range.
    const double bound = core::tie_bound(least);
    int winner = -1;
    for (int i = 0; i < kCandidates; ++i)
      if (error[i] <= bound && (winner < 0 || reach(range[i]) < reach(range[winner]))) winner = i;
    return range[winner];
  }

  TE_HD static double reach(const core::Range& range) {
    return -range.lo > range.hi ? -range.lo : range.hi;
  }
};
static_assert(core::CompositeRule<Mix>);

}  // namespace torch_ext::observers
