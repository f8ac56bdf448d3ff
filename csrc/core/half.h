#pragma once

#include <cstdint>
#include <type_traits>

#include "core/host_device.h"

// Storage of the 16-bit floating types, and their exact conversions. In integer arithmetic, because
// that gives the same bits on every device, does not depend on the flush-to-zero mode, and
// vectorises without F16C.
namespace torch_ext::core {

struct half {  // IEEE binary16: 1 sign, 5 exponent, 10 mantissa bits
  uint16_t bits;
};

struct bfloat16 {  // the upper half of a binary32
  uint16_t bits;
};

// The type that arithmetic on elements of type T is done in.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

TE_HD float to_float(bfloat16 x) { return __builtin_bit_cast(float, uint32_t{x.bits} << 16); }

TE_HD float to_float(half x) {
  const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16;
  const int32_t magnitude = x.bits & 0x7fff;
  // A subnormal is a count of 2^-24; a normal's exponent moves from bias 15 to bias 127 (by 112),
  // that of infinity and NaN from 31 to 255 (by 224).
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  const int32_t bias = (magnitude >= 0x7c00 ? 224 : 112) << 23;
  const uint32_t normal = static_cast<uint32_t>((magnitude << 13) + bias);
  const uint32_t bits = magnitude < 0x400 ? __builtin_bit_cast(uint32_t, subnormal) : normal;
  return __builtin_bit_cast(float, sign | bits);
}

// One rounding to nearest even. Saturates at the largest finite value, so that a finite result
// stays finite; every NaN becomes the one positive quiet NaN, so that devices agree bit for bit.
TE_HD bfloat16 to_bfloat16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  const int32_t finite = magnitude < 0x7f7f0000 ? magnitude : 0x7f7f0000;
  const int32_t rounded = (finite + 0x7fff + ((finite >> 16) & 1)) >> 16;
  const uint32_t number = (bits >> 31 << 15) | static_cast<uint32_t>(rounded);
  return bfloat16{static_cast<uint16_t>(magnitude > 0x7f800000 ? 0x7fc0u : number)};
}

TE_HD half to_half(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  const int32_t finite = magnitude < 0x477fe000 ? magnitude : 0x477fe000;  // 65504
  const int32_t normal = ((finite + 0xfff + ((finite >> 13) & 1)) >> 13) - (112 << 10);
  // Below 2^-14: the sum with 0.5, whose last bit is worth 2^-24, rounds to a count of subnormals.
  const float sum = __builtin_bit_cast(float, finite) + 0.5f;
  const int32_t subnormal = __builtin_bit_cast(int32_t, sum) - 0x3f000000;
  const int32_t rounded = finite < 0x38800000 ? subnormal : normal;
  const uint32_t number = (bits >> 31 << 15) | static_cast<uint32_t>(rounded);
  return half{static_cast<uint16_t>(magnitude > 0x7f800000 ? 0x7e00u : number)};
}

// From the element type to its computing type, exactly, and back.
TE_HD float widen(float x) { return x; }
TE_HD double widen(double x) { return x; }
TE_HD float widen(half x) { return to_float(x); }
TE_HD float widen(bfloat16 x) { return to_float(x); }

template <typename T>
TE_HD T narrow(compute_t<T> x) {
  if constexpr (std::is_same_v<T, half>) {
    return to_half(x);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return to_bfloat16(x);
  } else {
    return x;
  }
}

}  // namespace torch_ext::core
