#pragma once

#include "core/learned.h"
#include "core/qparams.h"
#include "core/unit_grid.h"

namespace torch_ext::fake_quant {

// Parameterized clipping (Choi et al. 2018, arXiv 1805.06085): the clipping level alpha is a
// parameter, and the scale is computed from it. On an unsigned grid x is clipped to [0, alpha], on
// a signed one to [-alpha, alpha].
//   d out / d x = 1 where x is not clipped, else 0
//   d out / d alpha = 1 where x >= alpha, -1 where x <= -alpha (two-sided), else 0
// The paper's L2 regularization of alpha is left to the optimizer's weight decay.
struct Pact {
  static constexpr const char* name = "pact";
  static constexpr const char* parameter = "alpha";
  static constexpr bool per_channel = false;
  static constexpr double start = 6;

  TE_HD static float effective(float alpha) {
    const float magnitude = alpha < 0 ? -alpha : alpha;
    return magnitude < 0x1p-110f ? 0x1p-110f : magnitude;
  }
  TE_HD static double sign(float alpha) { return alpha < 0 ? -1 : 1; }

  template <typename T>
  TE_HD static core::UnitGrid<T> unit_grid(float alpha, int32_t, const core::Codes& codes) {
    const double level = static_cast<double>(effective(alpha));
    const core::Grid grid{codes, true, core::ScaleRule::grid, false};
    const core::Range range{codes.is_unsigned() ? 0.0 : -level, level};
    return core::make_unit_grid<T>(core::qparams(range, grid).scale, 0, codes);
  }

  TE_HD static double unit(float) { return 1; }

  // The terms of one element; `level` is the effective alpha.
  template <typename T>
  TE_HD static core::Terms<T> backward(T x, T grad, const core::UnitGrid<T>& grid, T level) {
    const bool two_sided = grid.lo < 0;
    const bool above = x >= level, below = two_sided ? x <= -level : x < 0;
    const bool inside = two_sided ? (x < level) & (x > -level) : (x < level) & (x >= 0);
    const double wide = static_cast<double>(grad), low = two_sided ? -wide : 0.0;
    return {inside ? grad : T{}, above ? wide : below ? low : 0.0, 0.0};
  }

  TE_HD static double gradient_scale(double, double) { return 1; }
};
static_assert(core::LearnedFakeQuant<Pact>);

}  // namespace torch_ext::fake_quant
