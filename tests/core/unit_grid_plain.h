#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "core/half.h"
#include "core/unit_grid.h"

// Independent, slow versions of the formulas of core/unit_grid.h and core/half.h, in long double:
// its 64 bits hold every product here exactly, and quotients of floats round correctly when
// narrowed.
namespace plain {

using torch_ext::core::Mask;
using torch_ext::core::Rounding;

// A 16-bit float format: exponent and mantissa bits.
struct Format {
  int exponent;
  int mantissa;
};
constexpr Format kHalf{5, 10};
constexpr Format kBfloat16{8, 7};

inline long double decode(uint16_t bits, Format f) {
  const int e = (bits & 0x7fff) >> f.mantissa, m = bits & ((1 << f.mantissa) - 1);
  const int bias = (1 << (f.exponent - 1)) - 1;
  long double value;
  if (e == (1 << f.exponent) - 1)
    value = m != 0 ? std::numeric_limits<long double>::quiet_NaN()
                   : std::numeric_limits<long double>::infinity();
  else if (e == 0)
    value = std::ldexp(static_cast<long double>(m), 1 - bias - f.mantissa);
  else
    value = std::ldexp(1 + std::ldexp(static_cast<long double>(m), -f.mantissa), e - bias);
  return (bits & 0x8000) != 0 ? -value : value;
}

// All non-negative numbers of a format in ascending order, which is that of their patterns.
inline const std::vector<long double>& magnitudes(Format f) {
  static std::vector<long double> tables[2];
  std::vector<long double>& table = tables[f.mantissa == kHalf.mantissa ? 0 : 1];
  const int count = ((1 << f.exponent) - 1) << f.mantissa;
  for (int i = static_cast<int>(table.size()); i < count; ++i)
    table.push_back(decode(static_cast<uint16_t>(i), f));
  return table;
}

// The nearest finite number by bisection over all of them, the even one of two.
inline uint16_t encode(float x, Format f) {
  const std::vector<long double>& table = magnitudes(f);
  const int infinity = static_cast<int>(table.size());
  if (std::isnan(x)) return static_cast<uint16_t>(infinity | 1 << (f.mantissa - 1));
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const long double magnitude = std::fabs(static_cast<long double>(x));
  int below = 0, above = infinity;
  while (above - below > 1) {
    const int middle = (below + above) / 2;
    (table[middle] <= magnitude ? below : above) = middle;
  }
  if (above == infinity) return static_cast<uint16_t>(sign | below);
  const long double down = magnitude - table[below], up = table[above] - magnitude;
  const bool takes_above = up < down || (up == down && below % 2 == 1);
  return static_cast<uint16_t>(sign | (takes_above ? above : below));
}

inline long double half_even(long double v) {
  const long double floor = std::floor(v), fraction = v - floor;
  if (fraction != 0.5L) return fraction < 0.5L ? floor : floor + 1;
  return std::fmod(floor, 2.0L) == 0 ? floor : floor + 1;
}

struct Params {
  float scale;
  int32_t zero_point;
  int32_t quant_min;
  int32_t quant_max;
};

struct Mapped {
  float value;
  bool passes;
};

// Fake-quant of a float32 value.
inline Mapped fake_quant(float x, Params p, Rounding rounding, Mask mask) {
  const float ratio = static_cast<float>(static_cast<long double>(x) / p.scale);
  const long double v = ratio, half = 0.5L;
  if (std::isnan(x)) return {x, false};
  long double rounded = v;
  if (!std::isinf(ratio)) {
    // The engines' additions round to float32.
    if (rounding == Rounding::half_even)
      rounded = half_even(v);
    else if (rounding == Rounding::half_away)
      rounded = std::trunc(static_cast<float>(std::signbit(ratio) ? v - half : v + half));
    else
      rounded = std::floor(static_cast<float>(v + half));
  }
  const long double code = rounded + p.zero_point;
  const long double clamped = code < p.quant_min   ? p.quant_min
                              : code > p.quant_max ? p.quant_max
                                                   : code;
  const float inside = static_cast<float>(v + p.zero_point);
  const bool passes = mask == Mask::rounded ? code >= p.quant_min && code <= p.quant_max
                                            : inside > p.quant_min && inside < p.quant_max;
  return {static_cast<float>((clamped - p.zero_point) * p.scale), passes};
}

// float32 values of every kind: specials, denormals, the ends of the range, and ties on the grid.
inline std::vector<float> hostile_floats(Params p) {
  const float inf = std::numeric_limits<float>::infinity();
  const float max = std::numeric_limits<float>::max();
  std::vector<float> values = {0.0f,  -0.0f,     inf,        -inf,      std::nanf(""),    max,
                               -max,  0x1p-149f, -0x1p-149f, 0x1p-126f, 0x1.fffffcp-127f, 1e-30f,
                               1e30f, -1e30f};
  for (int code = p.quant_min - 2; code <= p.quant_max + 2;
       code += code > -20 && code < 20 ? 1 : 37)
    for (int quarter = 0; quarter < 4; ++quarter) {
      const float tie = (static_cast<float>(code - p.zero_point) + 0.25f * quarter) * p.scale;
      values.insert(values.end(), {tie, std::nextafter(tie, inf), std::nextafter(tie, -inf)});
    }
  for (int code : {p.quant_min - 1, p.quant_min, p.quant_max, p.quant_max + 1})
    for (float half : {-0.5f, 0.0f, 0.5f}) {
      const float edge = (static_cast<float>(code - p.zero_point) + half) * p.scale;
      values.insert(values.end(), {edge, std::nextafter(edge, inf), std::nextafter(edge, -inf)});
    }
  return values;
}

}  // namespace plain
