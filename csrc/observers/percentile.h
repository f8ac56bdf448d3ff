#pragma once

#include "core/contract.h"
#include "core/lattice.h"

namespace torch_ext::observers {

// Nearest-rank percentile, zeros included: of |x| on a symmetric grid, of x from both ends on an
// affine one. Ranks are computed in integers; the percentile is rounded to a multiple of 1e-7
// percent.
struct Percentile {
  static constexpr const char* name = "percentile";
  static constexpr core::Needs needs = core::Needs::counts;
  static constexpr int max_bits = 16;
  static constexpr core::Option options[] = {{"percentile", 99.99, 1e-7, 100}};
  static constexpr int32_t option_count = 1;

  // ceil(share * n / whole) for share <= whole <= 2^31, without overflow.
  TE_HD static int64_t rank(int64_t share, int64_t whole, int64_t n) {
    return share * (n / whole) + (share * (n % whole) + whole - 1) / whole;
  }

  // The k-th smallest |x|, 1 <= k <= finite.
  TE_HD static double magnitude(const core::View& view, int64_t k) {
    if (k == view.finite) return view.largest();
    if (k <= view.zeros + view.tiny) return view.floor();
    const int64_t i = core::first_where(view.bins, [&](int64_t bin) {
      const int64_t in_bins =
          view.below[core::kNegative][bin + 1] + view.below[core::kPositive][bin + 1];
      return view.zeros + view.tiny + in_bins >= k;
    });
    return view.value(i);
  }

  // The k-th smallest x, 1 <= k <= finite.
  TE_HD static double value(const core::View& view, int64_t k) {
    if (k == view.finite) return view.max;
    if (k == 1) return view.min;
    const int64_t negative = view.below[core::kNegative][view.bins];
    const int64_t to_positive = negative + view.zeros + view.tiny;
    if (k <= negative) {
      // Rank k from the most negative value is rank negative - k + 1 by magnitude.
      const int64_t i = core::first_where(view.bins, [&](int64_t bin) {
        return view.below[core::kNegative][bin + 1] > negative - k;
      });
      return -view.value(i);
    }
    if (k <= to_positive) return 0;
    const int64_t i = core::first_where(view.bins, [&](int64_t bin) {
      return view.below[core::kPositive][bin + 1] >= k - to_positive;
    });
    return view.value(i);
  }

  TE_HD static core::Range solve(const core::View& view, const core::Grid& grid,
                                 const double* options) {
    constexpr int64_t kWhole = 1000000000;  // 100 percent in steps of 1e-7
    const int64_t share = static_cast<int64_t>(__builtin_rint(options[0] * 1e7));
    if (grid.symmetric)
      return core::range_of_threshold(view, magnitude(view, rank(share, kWhole, view.finite)));
    const int64_t high = rank(kWhole + share, 2 * kWhole, view.finite);
    const int64_t mirrored = view.finite - high + 1;
    const core::Range range = {value(view, mirrored < high ? mirrored : high), value(view, high)};
    if (range.lo == 0 && range.hi == 0) return {view.min, view.max};
    return range;
  }
};
static_assert(core::ClosedRule<Percentile>);

}  // namespace torch_ext::observers
