#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "core/qparams.h"
#include "float_format_plain.h"

// The scales of microscaling formats: powers of two, and scales in units of a scale of the whole
// tensor. The references count with frexp and ldexp in long double.
namespace {

using namespace torch_ext::core;
using float_plain::kFormats;

Grid float_grid(const char* name, ScaleRule rule) {
  const FloatFormat& f = format_named(name)->format;
  const int32_t end = static_cast<int32_t>(f.largest);
  return {{-end, end, f}, true, rule, false};
}
Grid integer_grid(int32_t low, int32_t high, ScaleRule rule) {
  return {{low, high}, true, rule, false};
}

// The exponent of the power of two that a positive number begins with.
int exponent_of(long double v) {
  int exponent = 0;
  std::frexp(v, &exponent);
  return exponent - 1;
}

// Rounded to so many bits behind the first, half up.
long double half_up(long double v, int bits) {
  const int exponent = exponent_of(v);
  return std::ldexp(std::floor(std::ldexp(v, bits - exponent) + 0.5L), exponent - bits);
}

std::vector<float> bounds() {
  std::vector<float> all;
  // Every mantissa of a few bits and its neighbours, over all exponents.
  for (int e = -149; e < 128; ++e)
    for (int k = 0; k < 64; ++k) {
      const float v = static_cast<float>(std::ldexp(1 + k / 64.0L, e));
      for (const float near : {v, std::nextafter(v, 0.0f), std::nextafter(v, INFINITY)})
        if (near > 0 && std::isfinite(near)) all.push_back(near);
    }
  all.push_back(std::numeric_limits<float>::max());
  return all;
}

float expected(long double bound, int mantissa_bits, int largest_exponent, ScaleRule rule) {
  const long double rounded = rule == ScaleRule::even ? half_up(bound, mantissa_bits) : bound;
  const int exponent = exponent_of(rounded) - largest_exponent;
  return static_cast<float>(std::ldexp(1.0L, exponent < -126 ? -126 : exponent));
}

struct Case {
  Grid grid;
  int mantissa_bits;
  int largest_exponent;
};

TEST(ScaleRules, FloorAndEvenGiveThePowersOfTheSpecification) {
  std::vector<Case> cases;
  // emax of OCP's table.
  constexpr int kLargest[] = {8, 15, 2, 4, 2};
  for (int i = 0; i < 5; ++i)
    for (const ScaleRule rule : {ScaleRule::floor, ScaleRule::even})
      cases.push_back({float_grid(kFormats[i].name, rule), kFormats[i].mantissa_bits, kLargest[i]});
  cases.push_back({integer_grid(-128, 127, ScaleRule::floor), 0, 6});
  cases.push_back({integer_grid(-127, 127, ScaleRule::floor), 0, 6});
  cases.push_back({integer_grid(-8, 7, ScaleRule::floor), 0, 2});
  cases.push_back({integer_grid(0, 255, ScaleRule::floor), 0, 7});
  cases.push_back({integer_grid(-8, 0, ScaleRule::floor), 0, 3});
  for (const Case& c : cases)
    for (const float bound : bounds()) {
      float want = expected(bound, c.mantissa_bits, c.largest_exponent, c.grid.scale_rule);
      // A power of two that makes an end of the grid infinite is capped.
      const double most = std::fmax(c.grid.highest(), -c.grid.lowest());
      if (std::isinf(want * static_cast<float>(most))) want /= 2;
      const QParams q = qparams({c.grid.quant_max > 0 ? 0 : -bound, bound}, c.grid);
      ASSERT_EQ(q.scale, want) << bound << " on [" << c.grid.quant_min << ", " << c.grid.quant_max
                               << "]";
      ASSERT_EQ(q.zero_point, 0);
    }
}

TEST(ScaleRules, FloorIsBelowAndPowersUpAreNot) {
  for (const NamedFormat& entry : kFloatFormats) {
    Grid up = float_grid(entry.name, ScaleRule::grid);
    up.power_of_two = true;
    for (const float bound : bounds()) {
      if (bound < 0x1p-100f || bound > 0x1p126f) continue;  // there scales have bounds
      const Range range{-bound, bound};
      const double largest = entry.format.largest;
      const double floor = qparams(range, float_grid(entry.name, ScaleRule::floor)).scale;
      const double even = qparams(range, float_grid(entry.name, ScaleRule::even)).scale;
      ASSERT_LE(bound, qparams(range, up).scale * largest);
      ASSERT_LT(bound, floor * 2 * leading_power(largest));
      ASSERT_TRUE(even == floor || even == 2 * floor) << bound;
    }
  }
}

TEST(ScaleRules, DeadRangesHaveScaleOne) {
  for (const ScaleRule rule : {ScaleRule::floor, ScaleRule::even}) {
    EXPECT_EQ(qparams({0, 0}, float_grid("float8_e4m3", rule)).scale, 1);
  }
  EXPECT_EQ(qparams({-3, 0}, integer_grid(0, 255, ScaleRule::floor)).scale, 1);
  EXPECT_TRUE(
      std::isnan(qparams({0, INFINITY}, float_grid("float8_e4m3", ScaleRule::floor)).scale));
}

Grid nvfp4() {
  Grid grid = float_grid("float4_e2m1", ScaleRule::grid);
  grid.scale_format = format_named("float8_e4m3")->format;
  return grid;
}

TEST(TensorScale, ScalesAreE4m3TimesTheTensorsScale) {
  std::mt19937 random(5);
  std::uniform_real_distribution<float> mantissa(1, 2);
  for (int i = 0; i < 20000; ++i) {
    const float g = std::ldexp(mantissa(random), static_cast<int>(random() % 100) - 60);
    const float bound = std::ldexp(mantissa(random), static_cast<int>(random() % 30) - 12) * g;
    const double units = static_cast<double>(bound) / 6 / static_cast<double>(g);
    const double inside = std::fmin(std::fmax(units, 0x1p-6), 448);
    const float code = static_cast<float>(float_plain::nearest(kFormats[0], inside));
    ASSERT_EQ(qparams({-bound, bound / 2}, nvfp4(), g).scale, code * g) << bound << " in " << g;
  }
}

TEST(TensorScale, ZeroHasTheLeastScale) {
  EXPECT_EQ(qparams({0, 0}, nvfp4(), 3).scale, 3 * 0x1p-6f);
}

TEST(TensorScale, KeepsScalesWithinTheirBounds) {
  const Range valid = tensor_scales(nvfp4());
  const float lo = static_cast<float>(valid.lo), hi = static_cast<float>(valid.hi);
  EXPECT_EQ(lo, 0x1p-120f);
  ASSERT_TRUE(is_tensor_scale(lo, nvfp4()));
  EXPECT_EQ(qparams({0, 0}, nvfp4(), lo).scale, 0x1p-126f);
  const float most = static_cast<double>(hi) > valid.hi ? std::nextafter(hi, 0.0f) : hi;
  ASSERT_TRUE(is_tensor_scale(most, nvfp4()));
  const float top = std::numeric_limits<float>::max();
  EXPECT_TRUE(std::isfinite(qparams({-top, top}, nvfp4(), most).scale * 6));
  for (const float bad : {0.0f, -1.0f, std::nextafter(lo, 0.0f),
                          std::nextafter(hi, INFINITY) * 1.001f, INFINITY, NAN}) {
    EXPECT_FALSE(is_tensor_scale(bad, nvfp4()));
    EXPECT_TRUE(std::isnan(qparams({-1, 1}, nvfp4(), bad).scale)) << bad;
  }
}

}  // namespace
