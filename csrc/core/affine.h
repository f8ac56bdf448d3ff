#pragma once

#include <cstdint>

#include "core/host_device.h"

// Quantize and dequantize: the only rounding to a grid in the project. True division and no fused
// multiply-add (-ffp-contract=off, --fmad=false), so that the result is bit-equal to ONNX
// QuantizeLinear / DequantizeLinear. T is the computing type, float or double.
namespace torch_ext::core {

// half_even: ONNX, torch, TensorRT. half_away: ncnn. floor_half_up: BPU. The latter two add 0.5 in
// the computing type, as those engines do: the float32 nearest below 0.5 rounds to 1.
enum class Rounding : int32_t { half_even = 0, half_away = 1, floor_half_up = 2 };

// Where the straight-through gradient passes. rounded: the code is on the grid before clamping,
// ends included (torch). paper: x/scale + zero_point lies strictly inside, before rounding (LSQ).
enum class Mask : int32_t { rounded = 0, paper = 1 };

template <typename T>
struct Affine {
  T scale;
  T zero_point;
  T quant_min;
  T quant_max;
};

TE_HD bool is_valid_scale(float scale) { return scale > 0 && scale <= 0x1.fffffep127f; }

// Zero points and codes are exact in float, which holds integers up to 2^24. An invalid scale, or a
// zero point off the grid, becomes scale NaN and so makes every output NaN: on CUDA, where raising
// would need a host sync, a wrong qparam then never gives a plausible number.
template <typename T>
TE_HD Affine<T> make_affine(float scale, int32_t zero_point, int32_t quant_min, int32_t quant_max) {
  const bool valid = is_valid_scale(scale) && quant_min <= zero_point && zero_point <= quant_max;
  return {static_cast<T>(valid ? scale : __builtin_nanf("")), static_cast<T>(zero_point),
          static_cast<T>(quant_min), static_cast<T>(quant_max)};
}

TE_HD float round_half_even(float v) { return __builtin_rintf(v); }
TE_HD double round_half_even(double v) { return __builtin_rint(v); }
TE_HD float truncate(float v) { return __builtin_truncf(v); }
TE_HD double truncate(double v) { return __builtin_trunc(v); }
TE_HD float round_down(float v) { return __builtin_floorf(v); }
TE_HD double round_down(double v) { return __builtin_floor(v); }
TE_HD float half_with_sign_of(float v) { return __builtin_copysignf(0.5f, v); }
TE_HD double half_with_sign_of(double v) { return __builtin_copysign(0.5, v); }

template <typename T>
TE_HD T round_to_integer(T v, Rounding rounding) {
  if (rounding == Rounding::half_away) return truncate(v + half_with_sign_of(v));
  if (rounding == Rounding::floor_half_up) return round_down(v + T{0.5});
  return round_half_even(v);
}

// The code of x before it is clamped to the grid; may be infinite, or NaN.
template <typename T>
TE_HD T unclamped_code(T x, const Affine<T>& affine, Rounding rounding) {
  return round_to_integer(x / affine.scale, rounding) + affine.zero_point;
}

// A NaN passes through: both comparisons are false for it.
template <typename T>
TE_HD T clamp_to_grid(T code, const Affine<T>& affine) {
  const T at_least = affine.quant_min > code ? affine.quant_min : code;
  return affine.quant_max < at_least ? affine.quant_max : at_least;
}

// The code of x on the grid as a floating value: clamped before any conversion to an integer.
template <typename T>
TE_HD T quantize(T x, const Affine<T>& affine, Rounding rounding = Rounding::half_even) {
  return clamp_to_grid(unclamped_code(x, affine, rounding), affine);
}

template <typename T>
TE_HD T dequantize(T code, const Affine<T>& affine) {
  return (code - affine.zero_point) * affine.scale;
}

template <typename T>
TE_HD bool is_in_mask(T x, const Affine<T>& affine, Rounding rounding, Mask mask) {
  if (mask == Mask::paper) {
    const T code = x / affine.scale + affine.zero_point;
    return (code > affine.quant_min) & (code < affine.quant_max);
  }
  const T code = unclamped_code(x, affine, rounding);
  return (code >= affine.quant_min) & (code <= affine.quant_max);
}

}  // namespace torch_ext::core
