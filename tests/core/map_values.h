#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "arrays.h"
#include "core/half.h"
#include "cpu/kernels.h"
#include "cpu/map.h"
#include "unit_grid_plain.h"

// Data for tests of element-wise fake-quant, and its comparison with unit_grid_plain.h.
namespace mapped {

using namespace torch_ext;
using arrays::kDType;
using core::bfloat16;
using core::ChannelLayout;
using core::DType;
using core::half;
using core::Mask;
using core::Rounding;
using cpu::MapTask;

using Types = testing::Types<float, double, half, bfloat16>;

constexpr Rounding kRoundings[] = {Rounding::half_even, Rounding::half_away,
                                   Rounding::floor_half_up};
constexpr Mask kMasks[] = {Mask::rounded, Mask::paper};
constexpr int32_t kFakeQuant = -1;  // no learned parameter
constexpr uint8_t kGuard = 0xa5;

struct QParamsOf {
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
};

// Different for every channel.
inline QParamsOf qparams_of(int64_t channels) {
  QParamsOf q;
  for (int64_t c = 0; c < channels; ++c) {
    q.scale.push_back(0.01f + 0.003f * static_cast<float>(c % 101));
    q.zero_point.push_back(static_cast<int32_t>(c * 7 % 41) - 20);
  }
  return q;
}

// Values on both sides of the grid's ends, some on ties, some not finite.
template <typename T>
std::vector<T> values(int64_t n) {
  std::mt19937 random(static_cast<unsigned>(n) + 1);
  std::uniform_real_distribution<float> uniform(-6, 6);
  std::vector<T> x;
  for (int64_t i = 0; i < n; ++i) {
    float v = uniform(random);
    if (i % 17 == 3) v = std::ldexp(std::round(v * 8), -4);
    if (i % 61 == 5) v = i % 2 == 0 ? INFINITY : -INFINITY;
    if (i % 67 == 6) v = NAN;
    if (i % 71 == 8) v = -0.0f;
    if constexpr (std::is_same_v<T, half>)
      x.push_back({plain::encode(v, plain::kHalf)});
    else if constexpr (std::is_same_v<T, bfloat16>)
      x.push_back({plain::encode(v, plain::kBfloat16)});
    else
      x.push_back(static_cast<T>(v));
  }
  return x;
}

inline float value_of(float x) { return x; }
inline float value_of(double x) { return static_cast<float>(x); }
inline float value_of(half x) { return static_cast<float>(plain::decode(x.bits, plain::kHalf)); }
inline float value_of(bfloat16 x) {
  return static_cast<float>(plain::decode(x.bits, plain::kBfloat16));
}

inline bool same(float have, float want) { return std::memcmp(&have, &want, sizeof want) == 0; }
inline bool same(half have, float want) { return have.bits == plain::encode(want, plain::kHalf); }
inline bool same(bfloat16 have, float want) {
  return have.bits == plain::encode(want, plain::kBfloat16);
}

inline int count_of_sets() {
  int count = 0;
  while (cpu::runnable_kernels()[count] != nullptr) ++count;
  return count;
}

inline bool bit(const std::vector<uint8_t>& mask, int64_t i) { return mask[i / 8] >> (i % 8) & 1; }

// Memory that begins with a cache line, as torch's does: it can be written past the caches.
template <typename T>
struct Lines {
  using value_type = T;
  Lines() = default;
  template <typename U>
  explicit Lines(const Lines<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t{64}); }
  bool operator==(const Lines&) const { return true; }
};

// The output of a forward, with guard elements behind it.
template <typename T>
struct Output {
  explicit Output(int64_t n) : out(n + 64), mask((n + 7) / 8 + 64, kGuard) {
    std::memset(static_cast<void*>(out.data()), kGuard, out.size() * sizeof(T));
  }
  bool guards_hold(int64_t n) const {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(out.data());
    for (size_t i = n * sizeof(T); i < out.size() * sizeof(T); ++i)
      if (bytes[i] != kGuard) return false;
    for (size_t i = (n + 7) / 8; i < mask.size(); ++i)
      if (mask[i] != kGuard) return false;
    return n % 8 == 0 || mask[n / 8] >> (n % 8) == 0;
  }
  std::vector<T, Lines<T>> out;
  std::vector<uint8_t> mask;
};

template <typename T>
void expect_reference(const std::vector<T>& x, const Output<T>& y, const ChannelLayout& layout,
                      const QParamsOf& q, Rounding rounding, Mask mask, const std::string& where) {
  for (int64_t i = 0; i < layout.numel(); ++i) {
    const int64_t c = i / layout.inner % layout.channels;
    const plain::Params p{q.scale[c], q.zero_point[c], -128, 127};
    const std::string at = where + " element " + std::to_string(i);
    if constexpr (std::is_same_v<T, double>) {
      const auto grid = core::make_unit_grid<double>(p.scale, p.zero_point, {-128, 127}, rounding);
      const double want = core::dequantize(core::quantize(x[i], grid), grid);
      if (std::isnan(x[i])) {
        ASSERT_TRUE(std::isnan(y.out[i])) << at;
      } else {
        ASSERT_EQ(y.out[i], want) << at;
      }
      ASSERT_EQ(bit(y.mask, i), core::is_in_mask(x[i], grid, mask)) << at;
    } else {
      const plain::Mapped want = plain::fake_quant(value_of(x[i]), p, rounding, mask);
      if (std::isnan(want.value)) {
        ASSERT_TRUE(std::isnan(value_of(y.out[i]))) << at;
      } else {
        ASSERT_TRUE(same(y.out[i], want.value + 0.0f)) << at << " " << value_of(x[i]);
      }
      ASSERT_EQ(bit(y.mask, i), want.passes) << at << " " << value_of(x[i]);
    }
  }
  ASSERT_TRUE(y.guards_hold(layout.numel())) << where;
}

}  // namespace mapped
