#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <vector>

// Independent versions of the formats of core/float_format.h, from the OCP specifications: every
// pattern of bits is decoded, and rounding looks for the nearest of all numbers.
namespace float_plain {

struct Format {
  const char* name;
  int exponent_bits;
  int mantissa_bits;
  int bias;
  int numbers;  // patterns of sign 0 that are finite numbers, the first ones
};
constexpr Format kFormats[] = {{"float8_e4m3", 4, 3, 7, 0x7f},
                               {"float8_e5m2", 5, 2, 15, 0x7c},
                               {"float6_e2m3", 2, 3, 1, 0x20},
                               {"float6_e3m2", 3, 2, 3, 0x20},
                               {"float4_e2m1", 2, 1, 1, 0x08}};

inline long double decode(const Format& f, int pattern) {
  const int e = pattern >> f.mantissa_bits, k = pattern & ((1 << f.mantissa_bits) - 1);
  const long double fraction = std::ldexp(static_cast<long double>(k), -f.mantissa_bits);
  return e == 0 ? std::ldexp(fraction, 1 - f.bias) : std::ldexp(1 + fraction, e - f.bias);
}

// All numbers and the one that would follow, in ascending order.
inline const std::vector<long double>& magnitudes(const Format& f) {
  static std::vector<long double> tables[std::size(kFormats)];
  std::vector<long double>& table = tables[&f - kFormats];
  for (int i = static_cast<int>(table.size()); i <= f.numbers; ++i) table.push_back(decode(f, i));
  return table;
}

// The nearest number, of two the one with the even pattern; its sign is that of x. Without
// `saturates` a format goes on after its largest number, and gives infinity for what would round to
// the next.
inline long double nearest(const Format& f, long double x, bool saturates = true) {
  if (std::isnan(x)) return x;
  const long double magnitude = std::fabs(x);
  const std::vector<long double>& table = magnitudes(f);
  int below = 0;
  for (int step = 128; step > 0; step /= 2)
    if (below + step <= f.numbers && table[below + step] <= magnitude) below += step;
  long double value = std::numeric_limits<long double>::infinity();
  if (below < f.numbers) {
    const long double down = magnitude - table[below], up = table[below + 1] - magnitude;
    const int index = down < up || (down == up && below % 2 == 0) ? below : below + 1;
    if (index < f.numbers) value = table[index];
  }
  if (std::isinf(value) && saturates) value = table[f.numbers - 1];
  return std::copysign(value, x);
}

// Fake-quant of a value of computing type C, and whether the gradient passes.
template <typename C>
struct Mapped {
  C value;
  bool rounded, paper;
};
template <typename C>
Mapped<C> fake_quant(const Format& f, C x, float scale) {
  const C v = x / static_cast<C>(scale);
  if (std::isnan(x)) return {x, false, false};
  const C largest = static_cast<C>(decode(f, f.numbers - 1));
  const long double units = nearest(f, v);
  return {static_cast<C>(units * static_cast<long double>(scale)),
          !std::isinf(nearest(f, v, false)), -largest < v && v < largest};
}

// All numbers, what lies between two of them, and their neighbours, times the scale, with both
// signs; what is beyond them, subnormal, or no number.
template <typename C>
std::vector<C> hostile(const Format& f, float scale) {
  const C inf = std::numeric_limits<C>::infinity();
  std::vector<C> values = {0,
                           inf,
                           std::numeric_limits<C>::quiet_NaN(),
                           std::numeric_limits<C>::max(),
                           std::numeric_limits<C>::denorm_min(),
                           std::numeric_limits<C>::min(),
                           static_cast<C>(1e30f)};
  for (int i = 0; i < f.numbers; ++i) {
    for (const long double share : {0.0L, 0.25L, 0.5L, 0.75L}) {
      const long double units = decode(f, i) + share * (decode(f, i + 1) - decode(f, i));
      const C at = static_cast<C>(units * scale);
      values.insert(values.end(), {at, std::nextafter(at, inf), std::nextafter(at, -inf)});
    }
  }
  const size_t positive = values.size();
  for (size_t i = 0; i < positive; ++i) values.push_back(-values[i]);
  return values;
}

template <typename C>
bool same(C a, C b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

}  // namespace float_plain
