#pragma once

#include <cstdint>

#include "core/float_format.h"
#include "core/host_device.h"

namespace torch_ext::core {

// How a symmetric scale follows from the largest magnitude T: `grid` divides by the width of the
// grid, `tvm` by 2^(bits-1) (2^bits unsigned). `floor` and `even` take powers of two: 2^(n - e),
// where 2^n is the one that T begins with and 2^e the one that the grid's largest value begins with
// (OCP MX 1.0), for `even` after T has been rounded to the mantissa bits of the float format, half
// up. Values of more than the largest one saturate.
enum class ScaleRule : int32_t { grid = 0, tvm = 1, floor = 2, even = 3 };

// The integers that stand for the values of a grid; or the float format whose values they are.
struct Codes {
  int32_t quant_min;  // of a float format, its ends without their fraction
  int32_t quant_max;
  FloatFormat format = {0, 0, 0, 0};

  TE_HD bool is_float() const { return format.bits != 0; }
  // The ends in units of the scale, before the zero point is taken out.
  TE_HD double lowest() const {
    return is_float() ? -static_cast<double>(format.largest) : static_cast<double>(quant_min);
  }
  TE_HD double highest() const {
    return is_float() ? static_cast<double>(format.largest) : static_cast<double>(quant_max);
  }
  TE_HD bool has_zero_point(int32_t zero_point) const {
    return is_float() ? zero_point == 0 : quant_min <= zero_point && zero_point <= quant_max;
  }
  // Bits that hold the grid: 8 for [-128,127], [-127,127] and [0,255].
  TE_HD int bits() const {
    if (is_float()) return format.bits;
    int bits = 1;
    while ((int64_t{1} << bits) < int64_t{quant_max} - quant_min + 1) ++bits;
    return bits;
  }
  TE_HD bool is_unsigned() const { return quant_min >= 0; }
};

// The grid a tensor is quantized to: its codes, and how a range becomes scale and zero point. One
// of a float format is symmetric, without ScaleRule::tvm.
struct Grid : Codes {
  bool symmetric;
  ScaleRule scale_rule;
  bool power_of_two;
  // What scales are rounded to, in units of one scale of the whole tensor (NVFP4); bits 0: they are
  // float32. Needs a symmetric grid, ScaleRule::grid and no powers of two.
  FloatFormat scale_format = {0, 0, 0, 0};

  TE_HD bool has_tensor_scale() const { return scale_format.bits != 0; }
  // Whether scales are powers of two, rounded in whichever direction.
  TE_HD bool has_powers() const {
    return power_of_two || scale_rule == ScaleRule::floor || scale_rule == ScaleRule::even;
  }
};

// A clipping range in the units of the data, lo <= hi. In float64, so that it is rounded only once,
// when it is stored as float32.
struct Range {
  double lo;
  double hi;
};

struct QParams {
  float scale;
  int32_t zero_point;
};

}  // namespace torch_ext::core
