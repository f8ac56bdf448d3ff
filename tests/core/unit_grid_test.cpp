#include "core/unit_grid.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "core/half.h"
#include "fake_quant/fake_quant.h"
#include "unit_grid_plain.h"

namespace {

using namespace torch_ext::core;
using torch_ext::fake_quant::FakeQuant;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kMax = std::numeric_limits<float>::max();
constexpr Codes kInt8{-128, 127};
constexpr Rounding kRoundings[] = {Rounding::half_even, Rounding::half_away,
                                   Rounding::floor_half_up};

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float fake_quant(float x, float scale, int zero_point, int quant_min, int quant_max,
                 Rounding rounding = Rounding::half_even) {
  return FakeQuant::forward(
      x, make_unit_grid<float>(scale, zero_point, {quant_min, quant_max}, rounding));
}

// ---- 16-bit types ----

TEST(Half, EveryPatternIsReadExactly) {
  for (uint32_t i = 0; i < 0x10000; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    const float want[] = {static_cast<float>(plain::decode(bits, plain::kHalf)),
                          static_cast<float>(plain::decode(bits, plain::kBfloat16))};
    const float have[] = {to_float(half{bits}), to_float(bfloat16{bits})};
    for (int k = 0; k < 2; ++k) {
      if (std::isnan(want[k]))
        ASSERT_TRUE(std::isnan(have[k])) << i;
      else
        ASSERT_EQ(bits_of(have[k]), bits_of(want[k])) << i;
    }
  }
}

TEST(Half, EveryNumberAndNanSurvivesARoundTrip) {
  for (uint32_t i = 0; i < 0x10000; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i), magnitude = bits & 0x7fff;
    if (magnitude > 0x7c00) {
      EXPECT_EQ(to_half(to_float(half{bits})).bits, 0x7e00);
    } else if (magnitude < 0x7c00) {
      ASSERT_EQ(to_half(to_float(half{bits})).bits, bits);
    }
    if (magnitude > 0x7f80) {
      EXPECT_EQ(to_bfloat16(to_float(bfloat16{bits})).bits, 0x7fc0);
    } else if (magnitude < 0x7f80) {
      ASSERT_EQ(to_bfloat16(to_float(bfloat16{bits})).bits, bits);
    }
  }
}

TEST(Half, RoundsToNearestEvenBetweenAllNeighbours) {
  for (uint32_t i = 0; i < 0xffff; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    for (const plain::Format format : {plain::kHalf, plain::kBfloat16}) {
      const long double a = plain::decode(bits, format);
      const long double b = plain::decode(static_cast<uint16_t>(i + 1), format);
      if (!std::isfinite(a) || !std::isfinite(b)) continue;
      const float middle = static_cast<float>((a + b) / 2);
      for (const float x : {middle, std::nextafter(middle, kInf), std::nextafter(middle, -kInf)}) {
        const uint16_t have = format.mantissa == 10 ? to_half(x).bits : to_bfloat16(x).bits;
        ASSERT_EQ(have, plain::encode(x, format)) << x;
      }
    }
  }
}

TEST(Half, RoundsRandomPatternsAsTheReference) {
  std::mt19937 random(1);
  for (int i = 0; i < 200000; ++i) {
    const float x = float_of(static_cast<uint32_t>(random()));
    ASSERT_EQ(to_half(x).bits, plain::encode(x, plain::kHalf)) << x;
    ASSERT_EQ(to_bfloat16(x).bits, plain::encode(x, plain::kBfloat16)) << x;
  }
}

TEST(Half, SaturatesAtTheLargestFiniteValue) {
  for (const float x : {65504.0f, 65519.0f, 65520.0f, 65536.0f, 1e30f, kMax, kInf}) {
    EXPECT_EQ(to_half(x).bits, 0x7bff) << x;
    EXPECT_EQ(to_half(-x).bits, 0xfbff) << x;
  }
  for (const float x : {0x1.fep127f, 0x1.ffp127f, kMax, kInf}) {
    EXPECT_EQ(to_bfloat16(x).bits, 0x7f7f) << x;
    EXPECT_EQ(to_bfloat16(-x).bits, 0xff7f) << x;
  }
}

// ---- golden values ----

// LSQ kernels of torch print these for scale 1 on int8.
const float kVector[] = {-200, -128.4f, -1.5f,  -0.5f,  0.2f,   0.5f,
                         1.5f, 2.5f,    126.6f, 127.4f, 127.6f, 300};

TEST(FakeQuantGolden, TorchVector) {
  const float want[] = {-128, -128, -2, 0, 0, 0, 2, 2, 127, 127, 127, 127};
  const UnitGrid<float> grid = make_unit_grid<float>(1, 0, kInt8);
  for (int i = 0; i < 12; ++i) {
    EXPECT_EQ(FakeQuant::forward(kVector[i], grid), want[i]) << kVector[i];
    // -128.4 and 127.4 round onto the grid, but lie outside it before.
    EXPECT_EQ(FakeQuant::passes(kVector[i], grid, Mask::rounded), i >= 1 && i <= 9);
    EXPECT_EQ(FakeQuant::passes(kVector[i], grid, Mask::paper), i >= 2 && i <= 8);
  }
}

TEST(FakeQuantGolden, NcnnRoundsHalfAwayFromZero) {
  const float x[] = {0.5f, -0.5f, 2.5f, 126.5f, -200}, away[] = {1, -1, 3, 127, -127},
              even[] = {0, 0, 2, 126, -127};
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(fake_quant(x[i], 1, 0, -127, 127, Rounding::half_away), away[i]);
    EXPECT_EQ(fake_quant(x[i], 1, 0, -127, 127, Rounding::half_even), even[i]);
  }
}

TEST(FakeQuantGolden, BpuRoundsHalfUp) {
  const float scale = static_cast<float>(99 / 127.5);
  EXPECT_NEAR(fake_quant(-99, scale, 0, -128, 127, Rounding::floor_half_up), -98.6117706f, 1e-5f);
  EXPECT_EQ(fake_quant(-99, scale, 0, -128, 127, Rounding::half_even), -128 * scale);
  EXPECT_EQ(fake_quant(-2.5f, 1, 0, -128, 127, Rounding::floor_half_up), -2);
  EXPECT_EQ(fake_quant(2.5f, 1, 0, -128, 127, Rounding::floor_half_up), 3);
}

// The engines add the half in float32, where the sum rounds up to 1.
TEST(FakeQuantGolden, TheHalfIsAddedInTheComputingType) {
  const float x = std::nextafter(0.5f, 0.0f);
  EXPECT_EQ(round_to_integer(x, Rounding::half_away), 1.0f);
  EXPECT_EQ(round_to_integer(-x, Rounding::half_away), -1.0f);
  EXPECT_EQ(round_to_integer(x, Rounding::floor_half_up), 1.0f);
  EXPECT_EQ(round_to_integer(x, Rounding::half_even), 0.0f);
  EXPECT_EQ(round_to_integer(static_cast<double>(x), Rounding::half_away), 0.0);
  EXPECT_EQ(round_to_integer(static_cast<double>(x), Rounding::floor_half_up), 0.0);
}

TEST(FakeQuantGolden, RoundsUnitsOfTheScaleWithoutTheZeroPoint) {
  for (const int zero_point : {-3, -2, 1, 7}) {
    const UnitGrid<float> grid = make_unit_grid<float>(1, zero_point, kInt8);
    EXPECT_EQ(quantize(0.5f, grid), 0);
    EXPECT_EQ(quantize(1.5f, grid), 2);
    EXPECT_EQ(quantize(-0.5f, grid), 0);
    EXPECT_EQ(quantize(1e3f, grid), 127 - zero_point);
    EXPECT_EQ(quantize(-1e3f, grid), -128 - zero_point);
  }
}

// ---- laws ----

// Codes are integers in the engines, so there is no negative zero.
TEST(FakeQuant, NeverGivesNegativeZero) {
  for (const Rounding rounding : kRoundings)
    for (const float x : {-0.0f, 0.0f, -0.3f, 0.3f, -0x1p-149f})
      for (const int zero_point : {-5, 0, 5})
        EXPECT_EQ(bits_of(fake_quant(x, 1, zero_point, -128, 127, rounding)), 0u) << x;
}

TEST(FakeQuant, SaturatesAndKeepsNan) {
  for (const Rounding rounding : kRoundings) {
    for (const float big : {kInf, kMax, 1e30f}) {
      EXPECT_EQ(fake_quant(big, 0.5f, 3, -128, 127, rounding), 62);
      EXPECT_EQ(fake_quant(-big, 0.5f, 3, -128, 127, rounding), -65.5f);
    }
    // The quotient overflows.
    EXPECT_EQ(fake_quant(kMax, 0x1p-126f, 0, -128, 127, rounding), 127 * 0x1p-126f);
    EXPECT_EQ(fake_quant(-kMax, 0x1p-126f, 0, -128, 127, rounding), -0x1p-119f);
    EXPECT_TRUE(std::isnan(fake_quant(std::nanf(""), 1, 0, -128, 127, rounding)));
    const UnitGrid<double> grid = make_unit_grid<double>(0.5f, 3, kInt8, rounding);
    EXPECT_TRUE(std::isnan(FakeQuant::forward(std::nan(""), grid)));
    EXPECT_EQ(FakeQuant::forward(1e300, grid), 62);
    for (const Mask mask : {Mask::rounded, Mask::paper}) {
      EXPECT_FALSE(FakeQuant::passes(std::nan(""), grid, mask));
      EXPECT_FALSE(FakeQuant::passes(1e300, grid, mask));
      EXPECT_FALSE(FakeQuant::passes(static_cast<double>(-kInf), grid, mask));
    }
  }
}

TEST(FakeQuant, AnInvalidScaleGivesNanAndNoGradient) {
  for (const float scale : {0.0f, -0.0f, -1.0f, kInf, -kInf, std::nanf("")}) {
    EXPECT_FALSE(is_valid_scale(scale));
    const UnitGrid<float> grid = make_unit_grid<float>(scale, 0, kInt8);
    for (const float x : {0.0f, 1.0f, -kInf}) {
      EXPECT_TRUE(std::isnan(FakeQuant::forward(x, grid))) << scale;
      EXPECT_FALSE(FakeQuant::passes(x, grid, Mask::rounded));
      EXPECT_FALSE(FakeQuant::passes(x, grid, Mask::paper));
    }
  }
  for (const float scale : {0x1p-149f, 0x1p-126f, 1.0f, kMax}) EXPECT_TRUE(is_valid_scale(scale));
}

TEST(FakeQuant, TheGradientPassesOrIsZero) {
  EXPECT_EQ(FakeQuant::backward(2.5f, true), 2.5f);
  EXPECT_EQ(FakeQuant::backward(2.5f, false), 0.0f);
  EXPECT_EQ(FakeQuant::backward(std::nanf(""), false), 0.0f);
  EXPECT_EQ(bits_of(FakeQuant::backward(-kInf, false)), 0u);
  EXPECT_TRUE(std::isnan(FakeQuant::backward(std::nanf(""), true)));
}

TEST(FakeQuant, EqualsTheReferenceOnHostileFloats) {
  const plain::Params params[] = {
      {1, 0, -128, 127},     {0.1f, 0, -127, 127},    {0.0115294f, 3, -128, 127},
      {0.7f, 85, 0, 255},    {1 / 3.0f, 255, 0, 255}, {3e-5f, -12345, -32768, 32767},
      {0x1p-126f, 7, 0, 15}, {1e30f, -1, -8, 7},      {2.5f, 0, 0, 1}};
  for (const plain::Params& p : params)
    for (const Rounding rounding : kRoundings)
      for (const float x : plain::hostile_floats(p)) {
        const UnitGrid<float> grid =
            make_unit_grid<float>(p.scale, p.zero_point, {p.quant_min, p.quant_max}, rounding);
        for (const Mask mask : {Mask::rounded, Mask::paper}) {
          const plain::Mapped want = plain::fake_quant(x, p, rounding, mask);
          const float have = FakeQuant::forward(x, grid);
          if (std::isnan(x)) {
            ASSERT_TRUE(std::isnan(have));
          } else {
            ASSERT_EQ(bits_of(have), bits_of(want.value + 0.0f)) << x << " scale " << p.scale;
          }
          ASSERT_EQ(FakeQuant::passes(x, grid, mask), want.passes)
              << x << " scale " << p.scale << " mask " << static_cast<int>(mask);
        }
      }
}

// x * (1 / scale) rounds twice, and other numbers become ties: this is how torch's own op differs.
TEST(FakeQuant, DividesRatherThanMultiplyingByTheReciprocal) {
  std::mt19937 random(2);
  std::uniform_real_distribution<float> uniform(0.001f, 1.0f);
  int differ = 0;
  for (int i = 0; i < 20000; ++i) {
    const float scale = uniform(random);
    const plain::Params p{scale, 0, -128, 127};
    const float x = (static_cast<float>(random() % 200) - 100 + 0.5f) * scale;
    const float want = plain::fake_quant(x, p, Rounding::half_even, Mask::rounded).value;
    ASSERT_EQ(fake_quant(x, scale, 0, -128, 127), want) << x << " / " << scale;
    const float reciprocal = 1 / scale;
    differ += plain::half_even(x * reciprocal) * scale != want ? 1 : 0;
  }
  EXPECT_GT(differ, 100);
}

TEST(FakeQuant, DoubleComputesInDouble) {
  std::mt19937_64 random(3);
  std::uniform_real_distribution<double> uniform(-20, 20);
  const float scale = 0.1f;
  const UnitGrid<double> grid = make_unit_grid<double>(scale, 5, kInt8);
  for (int i = 0; i < 20000; ++i) {
    const double x = uniform(random);
    const long double code = plain::half_even(static_cast<long double>(x) / scale) + 5;
    const long double clamped = code < -128 ? -128 : code > 127 ? 127 : code;
    ASSERT_EQ(FakeQuant::forward(x, grid), static_cast<double>((clamped - 5) * scale));
  }
  // In float32 these two are the same number.
  EXPECT_EQ(round_to_integer(2.5 + 1e-9, Rounding::half_even), 3);
  EXPECT_EQ(round_to_integer(2.5 - 1e-9, Rounding::half_even), 2);
  EXPECT_EQ(round_to_integer(-2.5, Rounding::half_away), -3);
  EXPECT_EQ(round_to_integer(-2.5, Rounding::floor_half_up), -2);
}

}  // namespace
