#pragma once

#include <cstdint>
#include <type_traits>

#include "core/half.h"
#include "core/histogram.h"
#include "gpu.h"

// Elements, and packets of 16 bytes that hold several of them.
namespace torch_ext::cuda {

template <class T>
constexpr int kPerPacket = 16 / static_cast<int>(sizeof(T));

// Element i of a packet. Loops over i are unrolled, so that i is a constant.
template <class T>
TE_GPU T element(const gpu::Packet& p, int i) {
  if constexpr (sizeof(T) == 2) {
    return T{static_cast<uint16_t>(p.words[i / 2] >> (16 * (i % 2)))};
  } else if constexpr (sizeof(T) == 4) {
    return core::float_of(p.words[i]);
  } else {
    const uint64_t bits = p.words[2 * i] | uint64_t{p.words[2 * i + 1]} << 32;
    return __builtin_bit_cast(double, bits);
  }
}

TE_GPU void set_element(gpu::Packet& p, int i, float value) { p.words[i] = core::bits_of(value); }
TE_GPU void set_element(gpu::Packet& p, int i, double value) {
  const uint64_t bits = __builtin_bit_cast(uint64_t, value);
  p.words[2 * i] = static_cast<uint32_t>(bits);
  p.words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
}
// Elements of 16 bits are set in ascending order.
template <class T>
TE_GPU void set_element(gpu::Packet& p, int i, T value) {
  const uint32_t bits = uint32_t{value.bits} << (16 * (i % 2));
  p.words[i / 2] = i % 2 == 0 ? bits : p.words[i / 2] | bits;
}

// The value as statistics count it: rounded to float32.
TE_GPU float observed(float x) { return x; }
TE_GPU float observed(double x) { return static_cast<float>(x); }
TE_GPU float observed(core::half x) { return gpu::widen(x); }
TE_GPU float observed(core::bfloat16 x) { return core::to_float(x); }

template <class T>
TE_GPU T nan_of() {
  if constexpr (std::is_same_v<T, core::half>)
    return T{0x7e00};
  else if constexpr (std::is_same_v<T, core::bfloat16>)
    return T{0x7fc0};
  else
    return static_cast<T>(__builtin_nanf(""));
}

inline bool is_aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

}  // namespace torch_ext::cuda
