#pragma once

#include <cstdint>

#include "core/host_device.h"

// The natural logarithm of all rules. A threshold search compares sums of logarithms, so the CPU's
// instruction sets and CUDA choose the same candidate only if a logarithm has the same bits on all
// of them. libm and CUDA's log differ in the last bit; this one uses only + - * / and bit
// operations, which are exactly specified as long as nothing is contracted to FMA
// (-ffp-contract=off, --fmad=false). Branch-free, so that a loop over it vectorises.
namespace torch_ext::core {

constexpr double kLn2 = 0x1.62e42fefa39efp-1;

namespace detail {

// ln 2 in two parts: the high part has 42 bits, so its product with an exponent is exact.
constexpr double kLn2High = 0x1.62e42fefa3800p-1;
constexpr double kLn2Low = 0x1.ef35793c76730p-45;

// (ln((1+s)/(1-s)) - 2s) / s for z = s^2 <= (3 - 2 sqrt 2)^2: minimax polynomial, error 2^-58.5.
// The coefficients come from a Remez exchange made for this file; they are close to those of the
// series, 2/3, 2/5, 2/7, ...
TE_HD double atanh_tail(double z) {
  const double w = z * z;
  const double odd =
      z * (0x1.5555555555592p-1 +
           w * (0x1.24924941f1295p-2 + w * (0x1.74663ee8bc916p-3 + w * 0x1.2f056395f5a67p-3)));
  const double even =
      w * (0x1.999999997fdb7p-2 + w * (0x1.c71c52095abb5p-3 + w * 0x1.39a1bab2e7e3cp-3));
  return odd + even;
}

}  // namespace detail

// ln x for normal positive x, within 1 ulp. For x <= 0, subnormal, infinite or NaN the result is
// meaningless (nothing traps), so callers handle 0 themselves.
TE_HD double log(double x) {
  // x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)): adding the distance from sqrt(1/2) to 1
  // carries into the exponent field exactly when the mantissa is at least sqrt(2)'s.
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  constexpr uint64_t kOne = 0x3ff0000000000000;
  const uint64_t bits = __builtin_bit_cast(uint64_t, x);
  const uint64_t biased = (bits + (kOne - kSqrtHalf)) >> 52;
  const double f = __builtin_bit_cast(double, bits - (biased << 52) + kOne) - 1.0;
  // Integer to double through the mantissa of 2^52: AVX2 has no 64-bit conversion.
  const double k = __builtin_bit_cast(double, biased | 0x4330000000000000) - (0x1p52 + 1023.0);

  // ln(1+f) = f - f^2/2 + s (f^2/2 + tail), s = f / (2+f): f carries the result, the rest is a
  // correction.
  const double s = f / (2.0 + f);
  const double half_square = 0.5 * f * f;
  const double correction = s * (half_square + detail::atanh_tail(s * s));
  return k * detail::kLn2High - ((half_square - (correction + k * detail::kLn2Low)) - f);
}

// The logarithm exponent * ln 2 + mantissa. Long sums of weight * log sum the two parts separately,
// so that they multiply by ln 2 once.
struct SplitLog {
  double exponent;
  double mantissa;
  TE_HD double value() const { return exponent * kLn2 + mantissa; }
};

// ln(a / b) with one division, error at most 1.5e-16, for a and b of at least 2^-1020.
TE_HD SplitLog log_ratio(double a, double b) {
  // The difference of the bit patterns is the difference of the base-2 logarithms, linear inside an
  // octave: off by 0.0861 at most. Rounded to an integer k it leaves a / (b 2^k) within 2^+-0.5861.
  constexpr uint64_t kOne = 0x3ff0000000000000, kHalf = 0x0008000000000000;
  constexpr uint64_t kExponent = 0xfff0000000000000;
  const uint64_t b_bits = __builtin_bit_cast(uint64_t, b);
  const uint64_t rounded = __builtin_bit_cast(uint64_t, a) - b_bits + (kOne + kHalf);
  const double near = __builtin_bit_cast(double, b_bits + (rounded & kExponent) - kOne);
  const double k =
      __builtin_bit_cast(double, (rounded >> 52) | 0x4330000000000000) - (0x1p52 + 1023);
  // s (2 + tail), minimax for |s| <= 0.2005, error 2^-54.8 of s.
  const double s = (a - near) / (a + near);
  const double z = s * s;
  const double higher_terms =
      0x1.249249b563175p-2 +
      z * (0x1.c71bff523fcb1p-3 +
           z * (0x1.7475375a7bc9dp-3 + z * (0x1.384c3d4f4db76p-3 + z * 0x1.3af16459f67d1p-3)));
  return {k,
          s * (2.0 + z * (0x1.5555555555787p-1 + z * (0x1.99999998ec1b3p-2 + z * higher_terms)))};
}

}  // namespace torch_ext::core
