#pragma once

#include "core/learned.h"
#include "core/qparams.h"
#include "core/unit_grid.h"

namespace torch_ext::fake_quant {

// Learned step size (Esser et al. 2020, arXiv 1902.08153): the scale is a parameter. With v = x/s
// and z the zero point, inside is quant_min < v + z < quant_max:
//   d out / d x = 1 inside, 0 outside
//   d out / d s = round(v) - v inside, quant_min - z below, quant_max - z above
//   d out / d z = 0 inside, -s outside            (LSQ+, Bhalgat et al. 2020, whose beta is -z s)
// On a float format round(v) is its nearest number, z is 0, and quant_max its largest one.
struct Lsq {
  static constexpr const char* name = "lsq";
  static constexpr const char* parameter = "scale";
  static constexpr bool per_channel = true;
  static constexpr double start = 0;

  // The optimizer can make s negative or tiny, so max(|s|, 2^-126) is used.
  TE_HD static float effective(float s) {
    const float magnitude = s < 0 ? -s : s;
    return magnitude < 0x1p-126f ? 0x1p-126f : magnitude;
  }
  // Derivative of |s| with respect to s; 1 at 0.
  TE_HD static double sign(float s) { return s < 0 ? -1 : 1; }

  template <typename T>
  TE_HD static core::UnitGrid<T> unit_grid(float s, int32_t zero_point, const core::Codes& codes) {
    return core::make_unit_grid<T>(effective(s), zero_point, codes);
  }

  // Terms are in units of x: round(v) - v is round(v) * s - x, which is exact.
  TE_HD static double unit(float s) { return static_cast<double>(effective(s)); }

  template <typename T>
  TE_HD static core::Terms<T> backward(T x, T grad, const core::UnitGrid<T>& grid, T) {
    const T v = x / grid.scale;
    const T code = v + grid.zero_point;
    const T quant_min = grid.lo + grid.zero_point, quant_max = grid.hi + grid.zero_point;
    const bool below = code <= quant_min, above = code >= quant_max;
    const bool inside = (code > quant_min) & (code < quant_max);
    const T nearest =
        grid.step.lift != 0 ? core::round_to_float(v, grid.step) : core::round_half_even(v);
    const T rounding = core::rounding_error(nearest, grid.scale, x);
    const T end = below ? grid.lo : above ? grid.hi : T{};
    const double step = inside ? static_cast<double>(rounding)
                               : static_cast<double>(end) * static_cast<double>(grid.scale);
    const double wide = static_cast<double>(grad);
    return {inside ? grad : T{}, wide * step, below | above ? wide : 0.0};
  }

  // 1 / sqrt(N quant_max), for N elements per scale (section 2.2 of the paper).
  TE_HD static double gradient_scale(double elements, double quant_max) {
    return 1.0 / __builtin_sqrt(elements * quant_max);
  }
};
static_assert(core::LearnedFakeQuant<Lsq>);

}  // namespace torch_ext::fake_quant
