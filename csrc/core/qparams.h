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

TE_HD double symmetric_scale(const Range& range, const Grid& grid) {
  const double bound = symmetric_bound(range, grid);
  if (grid.scale_rule == ScaleRule::tvm) {
    const int bits = grid.is_unsigned() ? grid.bits() : grid.bits() - 1;
    return bound / static_cast<double>(int64_t{1} << bits);
  }
  if (grid.is_unsigned()) return bound / static_cast<double>(grid.quant_max);
  return 2 * bound / grid_width(grid);
}

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
  if (grid.power_of_two) bits &= 0x7f800000u;
  return __builtin_bit_cast(float, bits);
}

TE_HD int32_t zero_point_on_grid(double value, const Grid& grid) {
  const double rounded = round_half_even(value);
  if (rounded < grid.quant_min) return grid.quant_min;
  if (rounded > grid.quant_max) return grid.quant_max;
  return static_cast<int32_t>(rounded);
}

// Scale and zero point of a range. Needs quant_min < quant_max, and quant_min <= 0 <= quant_max on
// a symmetric grid. A range that is not finite in float32, or not in order, gives scale NaN, for
// which fake-quant raises (CPU) or outputs NaN (CUDA).
TE_HD QParams qparams(const Range& range, const Grid& grid) {
  if (!is_valid_range(range)) return {__builtin_nanf(""), 0};
  if (is_dead(range, grid)) return {1.0f, 0};
  const Range wide = with_zero(range);
  const double width = wide.hi - wide.lo;
  double scale = grid.symmetric ? symmetric_scale(range, grid) : width / grid_width(grid);
  const bool from_scale = grid.power_of_two || scale < kLeastScale;
  if (grid.power_of_two) scale = next_power_of_two(scale);
  if (scale < kLeastScale) scale = kLeastScale;
  int32_t zero_point = 0;
  if (!grid.symmetric) {
    const double steps = from_scale ? wide.lo / scale : wide.lo * grid_width(grid) / width;
    zero_point = zero_point_on_grid(grid.quant_min - steps, grid);
  }
  // The cap comes last and does not change the zero point: another zero point could need a smaller
  // cap.
  const float cap = largest_scale(grid, zero_point);
  return {scale < static_cast<double>(cap) ? static_cast<float>(scale) : cap, zero_point};
}

}  // namespace torch_ext::core
