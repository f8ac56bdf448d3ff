#pragma once

#include "observers/clip_std.h"
#include "observers/mse.h"

namespace torch_ext::observers {

// Analytical clipping (ACIQ, Banner et al. 2019): the threshold that is optimal for Gaussian or for
// Laplace data of the observed deviation, whichever has the smaller squared error on the data.
struct Aciq : core::NoOptions {
  static constexpr const char* name = "aciq";
  static constexpr core::Needs needs = core::Needs::moments;
  static constexpr int max_bits = 8;
  static constexpr const char* only_integers = "its constants are those of equal levels";

  // Minimisers a of the paper's expected squared errors, in units of sigma and of mean |x - mu|,
  // for 2..9 bits: Gauss (a^2+1)(1-erf(a/sqrt 2)) + a^2/(3*4^bits) - sqrt(2/pi) a exp(-a^2/2),
  // Laplace 2 exp(-a) + a^2/(3*4^bits).
  TE_HD static double gauss(int bits) {
    constexpr double table[] = {1.710635168, 2.151592745, 2.559136462, 2.936200612,
                                3.286914215, 3.615114215, 3.92403549,  4.216329826};
    return table[bits - 2];
  }
  TE_HD static double laplace(int bits) {
    constexpr double table[] = {2.830682989, 3.897229465, 5.028640136, 6.204766334,
                                7.413126214, 8.645619984, 9.89675977,  11.16268502};
    return table[bits - 2];
  }

  TE_HD static core::Complaint complaint(const core::Grid& grid, core::HistogramLayout,
                                         const double*) {
    if (grid.bits() >= 2) return {};
    return {"quant_max", "at least quant_min + 2", static_cast<double>(grid.quant_max)};
  }

  // Mean of |x - mu|; zeros and tiny values count as 0.
  TE_HD static double mean_deviation(const core::View& view, double mu) {
    const double toward = mu < 0 ? -mu : mu;
    const core::Sign same = mu < 0 ? core::kNegative : core::kPositive;
    const core::Sign other = mu < 0 ? core::kPositive : core::kNegative;
    const int64_t at = view.position(toward);
    const int64_t inner = view.below[same][at] + view.zeros + view.tiny;
    const int64_t outer = view.below[same][view.bins] - view.below[same][at];
    const double far = core::magnitude_sum(view, other, 0, view.bins) +
                       toward * static_cast<double>(view.below[other][view.bins]);
    const double below =
        toward * static_cast<double>(inner) - core::magnitude_sum(view, same, 0, at);
    const double above =
        core::magnitude_sum(view, same, at, view.bins) - toward * static_cast<double>(outer);
    return (far + below + above) / static_cast<double>(view.finite);
  }

  TE_HD static core::Range solve(const core::View& view, const core::Grid& grid, const double*) {
    const bool one_sided = view.one_sided();
    // One-sided data on an unsigned or affine grid gets all levels, as many as one side of
    // two-sided data gets with one more bit.
    const int bits = grid.bits() + (one_sided && (grid.is_unsigned() || !grid.symmetric) ? 1 : 0);
    const double mu = one_sided ? 0 : ClipStd::mean(view);
    const double sigma = one_sided ? __builtin_sqrt(view.squares / static_cast<double>(view.finite))
                                   : ClipStd::deviation(view, mu);
    const core::Range g = ClipStd::around(view, mu, gauss(bits) * sigma);
    const core::Range l = ClipStd::around(view, mu, laplace(bits) * mean_deviation(view, mu));
    return Mse::relative_error(view, grid, l) < Mse::relative_error(view, grid, g) ? l : g;
  }
};
static_assert(core::ClosedRule<Aciq> && core::ChecksOptions<Aciq>);

}  // namespace torch_ext::observers
