#pragma once

#include <cstdint>
#include <string_view>

#include "core/host_device.h"

namespace torch_ext::core {

// A floating-point format of few bits, without infinities: its values are 0, k * 2^(e - m) for 0 <
// k < 2^m (subnormal numbers), and (2^m + k) * 2^(n - m) for e <= n and 0 <= k < 2^m up to the
// largest, each with both signs. m are the mantissa bits and e the least exponent.
struct FloatFormat {
  int32_t bits;  // with the sign; 0: no float format
  int32_t mantissa_bits;
  int32_t least_exponent;
  float largest;

  bool operator==(const FloatFormat&) const = default;
};

struct NamedFormat {
  const char* name;
  FloatFormat format;
};

// All formats. A new one is added with a line here.
inline constexpr NamedFormat kFloatFormats[] = {
    {"float8_e4m3", {8, 3, -6, 448}},     // OCP 8-bit; NaN is no value of a grid
    {"float8_e5m2", {8, 2, -14, 57344}},  // OCP 8-bit; infinities are no values of a grid
    {"float6_e2m3", {6, 3, 0, 7.5f}},     // OCP microscaling formats, as the next two
    {"float6_e3m2", {6, 2, -2, 28}},     {"float4_e2m1", {4, 1, 0, 6}},
};

// The entry of this name, or null.
constexpr const NamedFormat* format_named(std::string_view name) {
  for (const NamedFormat& entry : kFloatFormats)
    if (name == entry.name) return &entry;
  return nullptr;
}

// 2^exponent, where that is a normal number of the type.
template <typename T>
TE_HD T power_of(int exponent) {
  if constexpr (sizeof(T) == sizeof(float))
    return __builtin_bit_cast(float, static_cast<uint32_t>(exponent + 127) << 23);
  else
    return __builtin_bit_cast(double, static_cast<uint64_t>(exponent + 1023) << 52);
}

// The i-th value of a format from 0 on.
TE_HD double format_value(const FloatFormat& format, int32_t i) {
  const int32_t m = format.mantissa_bits, exponent = i >> m, mantissa = i & ((1 << m) - 1);
  const bool normal = exponent > 0;
  const int32_t unit = format.least_exponent - m + (normal ? exponent - 1 : 0);
  return static_cast<double>((normal ? 1 << m : 0) + mantissa) * power_of<double>(unit);
}

// How many values follow 0, up to the largest.
TE_HD int32_t format_values(const FloatFormat& format) {
  const uint64_t bits = __builtin_bit_cast(uint64_t, static_cast<double>(format.largest));
  const int32_t m = format.mantissa_bits;
  const int32_t exponent = static_cast<int32_t>(bits >> 52) - 1023 - format.least_exponent + 1;
  const uint64_t mantissa = bits >> (52 - m) & ((uint64_t{1} << m) - 1);
  return (exponent << m) + static_cast<int32_t>(mantissa);
}

}  // namespace torch_ext::core
