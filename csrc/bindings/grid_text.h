#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "core/grid.h"
#include "core/unit_grid.h"

// A grid is one argument of an op, a text:
//
//   grid = ( "[" quant_min "," quant_max "]" | format ) { " " word }
//   format = a name in core/float_format.h, such as "float8_e4m3"
//   word = "symmetric" | "affine" | "scale_rule=" ( "grid" | "tvm" | "floor" | "even" )
//        | "power_of_two"
//        | "scale_dtype=float8_e4m3"
//        | "rounding=" ( "half_even" | "half_away" | "floor_half_up" )
//
// such as "[-128,127] symmetric" or "[0,255] affine rounding=half_away" or "float8_e4m3". Words
// come in any order, no kind of them twice; those left out are scale_rule=grid and
// rounding=half_even. A float format is symmetric, whether its text says so or not, and takes
// neither tvm nor another rounding; integers do not take even, nor does power_of_two stand with
// floor or even. With scale_dtype= scales are rounded to that format, in units of one scale of the
// whole tensor. Every op takes every word, and reads those that concern it: a quantizer has one
// text for all ops. Another kind of grid is another word, and no other schema.
namespace torch_ext::bindings {

struct ParsedGrid {
  int64_t quant_min, quant_max;
  core::FloatFormat format = {0, 0, 0, 0};  // bits 0: integers
  std::optional<bool> symmetric;            // none: neither word
  core::ScaleRule scale_rule = core::ScaleRule::grid;
  bool power_of_two = false;
  core::FloatFormat scale_format = {0, 0, 0, 0};
  core::Rounding rounding = core::Rounding::half_even;

  bool is_float() const { return format.bits != 0; }
};

// Where a text stands, for errors: the op, the argument, and the index in a list.
struct GridSource {
  const char* op;
  std::string_view text;
  int64_t index = -1;
};

// The name of a float format.
const char* name_of(const core::FloatFormat& format);

// Raises unless the text is of this form. The bounds of the integers depend on what they are for:
ParsedGrid parse_grid(const GridSource& source);

// What data is quantized to, with scales and zero points that are given.
struct QuantizingGrid {
  core::Codes codes;
  core::Rounding rounding;
};
QuantizingGrid check_quantizing_grid(const GridSource& source);

// The grid of a learned method, which rounds half to even.
core::Codes check_learned_grid(const GridSource& source);

// The grid for which a range becomes a scale and a zero point: 0 is on it, it has at most 16 bits,
// and is said to be symmetric or affine.
struct SolvingGrid {
  core::Grid grid;
  core::Rounding rounding;  // for an op that also quantizes
};
SolvingGrid check_solving_grid(const GridSource& source);

}  // namespace torch_ext::bindings
