#include "core/float_format.h"

#include <gtest/gtest.h>

#include <cmath>
#include <iterator>
#include <random>

#include "core/qparams.h"
#include "core/unit_grid.h"
#include "fake_quant/fake_quant.h"
#include "float_format_plain.h"

namespace {

using namespace torch_ext::core;
using torch_ext::fake_quant::FakeQuant;

Codes codes_of(const float_plain::Format& f) {
  const FloatFormat& format = format_named(f.name)->format;
  const int32_t end = static_cast<int32_t>(format.largest);
  return {-end, end, format};
}

TEST(FloatFormat, HasTheNumbersOfItsSpecification) {
  ASSERT_EQ(std::size(float_plain::kFormats), std::size(kFloatFormats));
  for (const float_plain::Format& f : float_plain::kFormats) {
    ASSERT_NE(format_named(f.name), nullptr) << f.name;
    const FloatFormat& format = format_named(f.name)->format;
    EXPECT_EQ(format_values(format), f.numbers - 1) << f.name;
    EXPECT_EQ(format.bits, 1 + f.exponent_bits + f.mantissa_bits) << f.name;
    for (int i = 0; i < f.numbers; ++i)
      ASSERT_EQ(format_value(format, i), float_plain::decode(f, i)) << f.name << " " << i;
    EXPECT_EQ(format.largest, float_plain::decode(f, f.numbers - 1)) << f.name;
  }
  EXPECT_EQ(format_named("float8_e4m3fnuz"), nullptr);
  EXPECT_EQ(format_named(""), nullptr);
}

template <typename C>
void expect_nearest(const float_plain::Format& f, C x, float scale) {
  const UnitGrid<C> grid = make_unit_grid<C>(scale, 0, codes_of(f));
  const float_plain::Mapped<C> want = float_plain::fake_quant(f, x, scale);
  ASSERT_TRUE(float_plain::same(FakeQuant::forward(x, grid), want.value))
      << f.name << " " << x << " / " << scale << ": " << FakeQuant::forward(x, grid) << ", want "
      << want.value;
  ASSERT_EQ(FakeQuant::passes(x, grid, Mask::rounded), want.rounded) << f.name << " " << x;
  ASSERT_EQ(FakeQuant::passes(x, grid, Mask::paper), want.paper) << f.name << " " << x;
}

TEST(FloatFormat, RoundsToTheNearestNumberTheEvenOneOfTwo) {
  std::mt19937 random(3);
  std::uniform_int_distribution<int> exponent(-30, 20);
  for (const float_plain::Format& f : float_plain::kFormats) {
    for (const float scale : {1.0f, 0.037f, 3e-5f, 0x1p-126f, 1e30f}) {
      for (const float x : float_plain::hostile<float>(f, scale)) expect_nearest(f, x, scale);
      for (const double x : float_plain::hostile<double>(f, scale)) expect_nearest(f, x, scale);
      if (testing::Test::HasFatalFailure()) return;
    }
    for (int i = 0; i < 200000; ++i) {
      const float x = std::ldexp(static_cast<float>(random()) * 0x1p-31f - 1, exponent(random));
      expect_nearest(f, x, 1.0f);
      expect_nearest(f, static_cast<double>(x) * (1 + 0x1p-40), 0.7f);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

// As the formats have a -0, and onnxruntime gives it.
TEST(FloatFormat, KeepsTheSignOfZero) {
  for (const float_plain::Format& f : float_plain::kFormats) {
    const UnitGrid<float> grid = make_unit_grid<float>(1, 0, codes_of(f));
    for (const float x : {-0.0f, -0x1p-149f, -0x1p-30f}) {
      EXPECT_EQ(FakeQuant::forward(x, grid), 0) << f.name;
      EXPECT_TRUE(std::signbit(FakeQuant::forward(x, grid))) << f.name;
      EXPECT_FALSE(std::signbit(FakeQuant::forward(-x, grid))) << f.name;
    }
  }
}

TEST(FloatFormat, WrongQParamsGiveNan) {
  const Codes codes = codes_of(float_plain::kFormats[0]);
  for (const int32_t zero_point : {-448, -1, 1, 448})
    EXPECT_TRUE(std::isnan(FakeQuant::forward(1.0f, make_unit_grid<float>(1, zero_point, codes))));
  for (const float scale : {0.0f, -1.0f, INFINITY, NAN})
    EXPECT_TRUE(std::isnan(FakeQuant::forward(1.0f, make_unit_grid<float>(scale, 0, codes))));
}

TEST(FloatFormat, TheScaleTakesTheLargestMagnitudeToTheLargestNumber) {
  for (const float_plain::Format& f : float_plain::kFormats) {
    const double largest = static_cast<double>(float_plain::decode(f, f.numbers - 1));
    const Grid grid{codes_of(f), true, ScaleRule::grid, false};
    for (const Range& range : {Range{-3, 2}, {-1, 7.3}, {0, 5}, {-5, 0}, {2, 3}}) {
      const double bound = std::fmax(-range.lo, range.hi);
      const QParams q = qparams(range, grid);
      EXPECT_EQ(q.scale, static_cast<float>(bound / largest)) << f.name;
      EXPECT_EQ(q.zero_point, 0);
    }
    EXPECT_EQ(qparams({0, 0}, grid).scale, 1);
    // Every number dequantizes to a finite float32, and no larger scale has that property.
    const float most = qparams({-kLargestFloat, kLargestFloat}, grid).scale;
    EXPECT_TRUE(std::isfinite(most * static_cast<float>(largest))) << f.name;
    const Grid powers{codes_of(f), true, ScaleRule::grid, true};
    const float power = qparams({-3, 2}, powers).scale;
    EXPECT_GE(power, 3 / largest);
    EXPECT_LT(power, 6 / largest);
    EXPECT_EQ(std::exp2(std::rint(std::log2(power))), power);
  }
}

}  // namespace
