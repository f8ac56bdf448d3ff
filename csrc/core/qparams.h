#pragma once

#include <cstdint>

#include "core/grid.h"
#include "core/host_device.h"
#include "core/unit_grid.h"

// How a clipping range becomes scale and zero point. Float64 throughout; only the result is
// rounded.
namespace torch_ext::core {

constexpr double kLargestFloat = 0x1.fffffep127;
// From half an ulp above the largest float32 on, a value rounds to infinity.
constexpr double kRoundsToInfinity = 0x1.ffffffp127;
constexpr double kLeastScale = 0x1p-126;

TE_HD bool is_valid_range(const Range& range) {
  return range.lo >= -kLargestFloat && range.lo <= range.hi && range.hi <= kLargestFloat;
}

// The largest magnitude that a symmetric grid has to represent. An unsigned one ignores negative
// values.
TE_HD double symmetric_bound(const Range& range, const Grid& grid) {
  const double below = grid.is_unsigned() || range.lo > 0 ? 0 : -range.lo;
  const double above = range.hi > 0 ? range.hi : 0;
  return below > above ? below : above;
}

// The range extended to 0, which an affine grid always represents exactly.
TE_HD Range with_zero(const Range& range) {
  return {range.lo < 0 ? range.lo : 0, range.hi > 0 ? range.hi : 0};
}

// Whether there is nothing to quantize: all values zero, none positive on an unsigned symmetric
// grid, or none observed (the range is then (0, 0)).
TE_HD bool is_dead(const Range& range, const Grid& grid) {
  if (grid.symmetric) return symmetric_bound(range, grid) == 0;
  return range.lo == 0 && range.hi == 0;
}

TE_HD double grid_width(const Grid& grid) { return grid.highest() - grid.lowest(); }

// The least 2^k >= value, for a normal value.
TE_HD double next_power_of_two(double value) {
  const uint64_t exponent = 0x7ff0000000000000u, bits = __builtin_bit_cast(uint64_t, value);
  const uint64_t power = bits & exponent;
  const bool exact = bits == power;
  return __builtin_bit_cast(double, exact ? power : power + (uint64_t{1} << 52));
}

// The largest float32 scale with which every code of the grid dequantizes to a finite float32,
// given the zero point.
TE_HD float largest_scale(const Grid& grid, int32_t zero_point) {
  const double below = static_cast<double>(zero_point) - grid.lowest();
  const double above = grid.highest() - static_cast<double>(zero_point);
  const double steps = below > above ? below : above;
  const float scale = static_cast<float>(kRoundsToInfinity / steps);
  uint32_t bits = __builtin_bit_cast(uint32_t, scale);
  if (static_cast<double>(scale) * steps >= kRoundsToInfinity) --bits;  // the float32 below
  if (grid.has_powers()) bits &= 0x7f800000u;
  return __builtin_bit_cast(float, bits);
}

// The scales of a whole tensor for which all scales in grid.scale_format, times that one, are as
// they have to be.
TE_HD Range tensor_scales(const Grid& grid) {
  const FloatFormat& format = grid.scale_format;
  return {kLeastScale / power_of<double>(format.least_exponent),
          static_cast<double>(largest_scale(grid, 0)) / static_cast<double>(format.largest)};
}
TE_HD bool is_tensor_scale(float tensor_scale, const Grid& grid) {
  const Range valid = tensor_scales(grid);
  const double value = static_cast<double>(tensor_scale);
  return value >= valid.lo && value <= valid.hi;
}

// Turns bounds of a symmetric grid into scales. What depends on the grid alone is computed once, so
// that a loop over many bounds vectorises.
struct SymmetricScale {
  double factor, divisor;  // scale = factor * bound / divisor, before it is rounded
  uint64_t half;           // of ScaleRule::even, half a unit of the format's last bit; else 0
  bool from_power;         // ScaleRule::floor and even: the power that the bound begins with
  bool power_of_two;
  bool in_units;  // of a scale of the whole tensor, which is the unit
  double unit, least, largest;
  FloatStep<double> step;
  double cap;

  // `tensor_scale`: of a grid that has one; NaN for one that is_tensor_scale() refuses.
  TE_HD explicit SymmetricScale(const Grid& grid, float tensor_scale = 0)
      : factor(1),
        divisor(grid_width(grid)),
        half(0),
        from_power(grid.scale_rule == ScaleRule::floor || grid.scale_rule == ScaleRule::even),
        power_of_two(grid.power_of_two),
        in_units(grid.has_tensor_scale()),
        unit(0),
        least(0),
        largest(0),
        step(float_step<double>(grid.scale_format)),
        cap(static_cast<double>(largest_scale(grid, 0))) {
    if (from_power)
      divisor = leading_power(grid.highest() > 0 ? grid.highest() : -grid.lowest());
    else if (grid.scale_rule == ScaleRule::tvm)
      divisor = static_cast<double>(int64_t{1} << (grid.bits() - (grid.is_unsigned() ? 0 : 1)));
    else if (!grid.is_unsigned())
      factor = 2;  // exact, as the width of a narrow grid need not be even
    if (grid.scale_rule == ScaleRule::even) half = uint64_t{1} << (51 - grid.format.mantissa_bits);
    if (in_units) {
      unit = is_tensor_scale(tensor_scale, grid) ? static_cast<double>(tensor_scale)
                                                 : __builtin_nan("");
      least = step.least_normal;
      largest = static_cast<double>(grid.scale_format.largest);
    }
  }

  // Of a bound that symmetric_bound() gives, 0 to kLargestFloat; others give NaN.
  TE_HD float operator()(double bound) const {
    double scale = 0;
    if (in_units) {
      const double units = factor * bound / divisor / unit;
      const double at_least = units < least ? least : units;
      scale = round_to_float(at_least > largest ? largest : at_least, step) * unit;
    } else {
      double numerator = factor * bound;
      if (from_power)
        numerator =
            leading_power(__builtin_bit_cast(double, __builtin_bit_cast(uint64_t, bound) + half));
      scale = numerator / divisor;
      if (power_of_two) scale = next_power_of_two(scale);
      scale = scale < kLeastScale ? kLeastScale : scale;
      scale = scale < cap ? scale : cap;
      scale = bound == 0 ? 1 : scale;  // dead
    }
    return static_cast<float>(bound <= kLargestFloat ? scale : __builtin_nan(""));
  }
};

TE_HD int32_t zero_point_on_grid(double value, const Grid& grid) {
  const double rounded = round_half_even(value);
  if (rounded < grid.quant_min) return grid.quant_min;
  if (rounded > grid.quant_max) return grid.quant_max;
  return static_cast<int32_t>(rounded);
}

// Scale and zero point of a range. Needs quant_min < quant_max, and quant_min <= 0 <= quant_max on
// a symmetric grid; `tensor_scale` of a grid that has one. A range that is not finite in float32,
// or not in order, gives scale NaN, for which fake-quant raises (CPU) or outputs NaN (CUDA).
TE_HD QParams qparams(const Range& range, const Grid& grid, float tensor_scale = 0) {
  if (!is_valid_range(range)) return {__builtin_nanf(""), 0};
  if (grid.symmetric) return {SymmetricScale(grid, tensor_scale)(symmetric_bound(range, grid)), 0};
  if (is_dead(range, grid)) return {1.0f, 0};
  const Range wide = with_zero(range);
  const double width = wide.hi - wide.lo;
  double scale = width / grid_width(grid);
  const bool from_scale = grid.power_of_two || scale < kLeastScale;
  if (grid.power_of_two) scale = next_power_of_two(scale);
  if (scale < kLeastScale) scale = kLeastScale;
  const double steps = from_scale ? wide.lo / scale : wide.lo * grid_width(grid) / width;
  const int32_t zero_point = zero_point_on_grid(grid.quant_min - steps, grid);
  // The cap comes last and does not change the zero point: another zero point could need a smaller
  // cap.
  const float cap = largest_scale(grid, zero_point);
  return {scale < static_cast<double>(cap) ? static_cast<float>(scale) : cap, zero_point};
}

}  // namespace torch_ext::core
