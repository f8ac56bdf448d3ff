#pragma once

#include "core/affine.h"
#include "core/learned.h"
#include "core/qparams.h"

namespace torch_ext::fake_quant {

// Learned step size (Esser et al. 2020, arXiv 1902.08153): the scale is a parameter. With v = x/s
// and z the zero point, inside is quant_min < v + z < quant_max:
//   d out / d x = 1 inside, 0 outside
//   d out / d s = round(v) - v inside, quant_min - z below, quant_max - z above
//   d out / d z = 0 inside, -s outside            (LSQ+, Bhalgat et al. 2020, whose beta is -z s)
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
  TE_HD static core::Affine<T> affine(float s, int32_t zero_point, int32_t quant_min,
                                      int32_t quant_max) {
    return core::make_affine<T>(effective(s), zero_point, quant_min, quant_max);
  }

  // The terms of one element. `inverse` is 1 / scale in float64, so that the small difference
  // round(v) - v keeps its bits.
  template <typename T>
  TE_HD static core::Terms<T> backward(T x, T grad, const core::Affine<T>& affine, T,
                                       double inverse) {
    const T v = x / affine.scale;
    const T code = v + affine.zero_point;
    const bool below = code <= affine.quant_min, above = code >= affine.quant_max;
    const bool inside = (code > affine.quant_min) & (code < affine.quant_max);
    const double rounding =
        static_cast<double>(core::round_half_even(v)) - static_cast<double>(x) * inverse;
    const double clipped = below   ? static_cast<double>(affine.quant_min - affine.zero_point)
                           : above ? static_cast<double>(affine.quant_max - affine.zero_point)
                                   : 0.0;
    const double wide = static_cast<double>(grad);
    return {inside ? grad : T{}, wide * (inside ? rounding : clipped),
            below | above ? -wide * static_cast<double>(affine.scale) : 0.0};
  }

  // 1 / sqrt(N quant_max), for N elements per scale (section 2.2 of the paper).
  TE_HD static double gradient_scale(double elements, int32_t quant_max) {
    return 1.0 / __builtin_sqrt(elements * static_cast<double>(quant_max));
  }
};
static_assert(core::LearnedFakeQuant<Lsq>);

}  // namespace torch_ext::fake_quant
