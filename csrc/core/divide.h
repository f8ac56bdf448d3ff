#pragma once

#include <cstdint>

#include "core/host_device.h"

// Division of sizes and indices, a >= 0 and b > 0. A GPU takes several times longer for 64 bits
// than for 32, in which nearly all operands fit.
namespace torch_ext::core {

TE_HD bool fits_32_bits(int64_t a, int64_t b) { return (a | b) >> 32 == 0; }
TE_HD int64_t quotient(int64_t a, int64_t b) {
  return fits_32_bits(a, b) ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}
TE_HD int64_t modulo(int64_t a, int64_t b) {
  return fits_32_bits(a, b) ? static_cast<uint32_t>(a) % static_cast<uint32_t>(b) : a % b;
}

}  // namespace torch_ext::core
