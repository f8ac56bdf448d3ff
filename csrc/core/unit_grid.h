#pragma once

#include <cstdint>

#include "core/grid.h"
#include "core/host_device.h"

// Quantize and dequantize: the only rounding to a grid in the project. True division and no fused
// multiply-add (-ffp-contract=off, --fmad=false), so that the result is bit-equal to ONNX
// QuantizeLinear / DequantizeLinear. T is the computing type, float or double.
namespace torch_ext::core {

// half_even: ONNX, torch, TensorRT. half_away: ncnn. floor_half_up: BPU. The latter two add 0.5 in
// the computing type, as those engines do: the float32 nearest below 0.5 rounds to 1.
enum class Rounding : int32_t { half_even = 0, half_away = 1, floor_half_up = 2 };

// Where the straight-through gradient passes. rounded: the value on the grid before clamping,
// ends included (torch). paper: x/scale + zero_point, a sum in the computing type, lies strictly
// between quant_min and quant_max, before rounding (LSQ).
enum class Mask : int32_t { rounded = 0, paper = 1 };

// What rounding to a float format needs.
// Between 2^n and 2^(n+1) the format's numbers are 2^(n - m) apart, and so are those of T between
// 2^n * lift and twice that.
template <typename T>
struct FloatStep {
  T least_normal;  // 2^e
  T lift;          // 2^(mantissa bits of T - m); 0: the grid is of integers
};

template <typename T>
TE_HD FloatStep<T> float_step(const FloatFormat& format) {
  constexpr int kMantissaBits = sizeof(T) == sizeof(float) ? 23 : 52;
  if (format.bits == 0) return {0, 0};
  return {power_of<T>(format.least_exponent), power_of<T>(kMantissaBits - format.mantissa_bits)};
}

// The grid of one channel in units of its scale, with the zero point taken out: the values that x
// can become are k * scale, for the values k of the grid with lo <= k <= hi. Zero is one of them.
template <typename T>
struct UnitGrid {
  T scale;
  T lo;
  T hi;
  T zero_point;  // read by Mask::paper alone
  Rounding rounding;
  FloatStep<T> step = {0, 0};  // of a float format
};

TE_HD bool is_valid_scale(float scale) { return scale > 0 && scale <= 0x1.fffffep127f; }

// Exact in float, which holds integers up to 2^24. An invalid scale, or a zero point off the grid,
// becomes scale NaN and so makes every output NaN: on CUDA, where raising would need a host sync, a
// wrong qparam then never gives a plausible number.
template <typename T>
TE_HD UnitGrid<T> make_unit_grid(float scale, int32_t zero_point, const Codes& codes,
                                 Rounding rounding = Rounding::half_even) {
  const bool valid = is_valid_scale(scale) && codes.has_zero_point(zero_point);
  const T zero = static_cast<T>(zero_point);
  return {static_cast<T>(valid ? scale : __builtin_nanf("")),
          static_cast<T>(codes.lowest()) - zero,
          static_cast<T>(codes.highest()) - zero,
          zero,
          rounding,
          float_step<T>(codes.format)};
}

TE_HD float round_half_even(float v) { return __builtin_rintf(v); }
TE_HD double round_half_even(double v) { return __builtin_rint(v); }
TE_HD float truncate(float v) { return __builtin_truncf(v); }
TE_HD double truncate(double v) { return __builtin_trunc(v); }
TE_HD float round_down(float v) { return __builtin_floorf(v); }
TE_HD double round_down(double v) { return __builtin_floor(v); }
TE_HD float half_with_sign_of(float v) { return __builtin_copysignf(0.5f, v); }
TE_HD double half_with_sign_of(double v) { return __builtin_copysign(0.5, v); }
TE_HD float magnitude_of(float v) { return __builtin_fabsf(v); }
TE_HD double magnitude_of(double v) { return __builtin_fabs(v); }
TE_HD float with_sign_of(float magnitude, float v) { return __builtin_copysignf(magnitude, v); }
TE_HD double with_sign_of(double magnitude, double v) { return __builtin_copysign(magnitude, v); }
// The power of two that a normal number begins with; infinite for an infinity or NaN.
TE_HD float leading_power(float v) {
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, v) & 0x7f800000u);
}
TE_HD double leading_power(double v) {
  return __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, v) & 0x7ff0000000000000u);
}

template <typename T>
TE_HD T round_to_integer(T v, Rounding rounding) {
  if (rounding == Rounding::half_away) return truncate(v + half_with_sign_of(v));
  if (rounding == Rounding::floor_half_up) return round_down(v + T{0.5});
  return round_half_even(v);
}

// The nearest number of a float format without a largest one, the even one of two. In the sum the
// bits below the format's last one are rounded away, as every sum is. Keeps the sign of zero, and
// gives NaN for values that overflow the sum.
template <typename T>
TE_HD T round_to_float(T v, const FloatStep<T>& step) {
  const T power = leading_power(v);
  const T lifted = (power > step.least_normal ? power : step.least_normal) * step.lift;
  return with_sign_of((magnitude_of(v) + lifted) - lifted, v);
}

// Integers have no -0, as the codes that stand for them have none; floats do.
template <typename T>
TE_HD T round_to_grid(T v, const UnitGrid<T>& grid) {
  if (grid.step.lift != 0) return round_to_float(v, grid.step);
  return round_to_integer(v, grid.rounding) + T{0};
}

// The value of the grid that x becomes, in units of the scale. Clamping first gives the same as
// clamping last, because lo and hi are values of the grid and rounding keeps the order. A NaN
// passes through: both comparisons are false for it.
template <typename T>
TE_HD T quantize(T x, const UnitGrid<T>& grid) {
  const T v = x / grid.scale;
  const T at_least = grid.lo > v ? grid.lo : v;
  const T clamped = grid.hi < at_least ? grid.hi : at_least;
  return round_to_grid(clamped, grid);
}

template <typename T>
TE_HD T dequantize(T units, const UnitGrid<T>& grid) {
  return units * grid.scale;
}

template <typename T>
TE_HD bool is_strictly_inside(T v, const UnitGrid<T>& grid) {
  const T code = v + grid.zero_point;
  return (code > grid.lo + grid.zero_point) & (code < grid.hi + grid.zero_point);
}

template <typename T>
TE_HD bool is_in_mask(T x, const UnitGrid<T>& grid, Mask mask) {
  const T v = x / grid.scale;
  if (mask == Mask::paper) return is_strictly_inside(v, grid);
  const T units = round_to_grid(v, grid);
  return (units >= grid.lo) & (units <= grid.hi);
}

}  // namespace torch_ext::core
