#include "core/qparams.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace {

using namespace torch_ext::core;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kMax = std::numeric_limits<float>::max();
constexpr float kLeast = 0x1p-126f;

Grid symmetric(int quant_min, int quant_max) {
  return {{quant_min, quant_max}, true, ScaleRule::grid, false};
}
Grid affine(int quant_min, int quant_max) {
  return {{quant_min, quant_max}, false, ScaleRule::grid, false};
}
Grid power_of_two(Grid grid) {
  grid.power_of_two = true;
  return grid;
}
Grid tvm(Grid grid) {
  grid.scale_rule = ScaleRule::tvm;
  return grid;
}

const Grid kGrids[] = {symmetric(-128, 127),
                       symmetric(-127, 127),
                       symmetric(-8, 7),
                       symmetric(-32768, 32767),
                       symmetric(0, 255),
                       symmetric(0, 15),
                       tvm(symmetric(-128, 127)),
                       tvm(symmetric(0, 255)),
                       affine(-128, 127),
                       affine(-127, 127),
                       affine(0, 255),
                       affine(0, 65535),
                       affine(-8, 7),
                       affine(0, 1),
                       affine(1, 255)};

// The largest float32 a code of the grid stands for.
float largest_value(const QParams& q, const Grid& grid) {
  const float low = static_cast<float>(grid.quant_min) - static_cast<float>(q.zero_point);
  const float high = static_cast<float>(grid.quant_max) - static_cast<float>(q.zero_point);
  return std::fmax(std::fabs(low * q.scale), std::fabs(high * q.scale));
}

float value_of(int code, const QParams& q) {
  return (static_cast<float>(code) - static_cast<float>(q.zero_point)) * q.scale;
}

// ---- golden values ----

TEST(QParamsGolden, SymmetricDividesByHalfTheWidth) {
  const Grid grid = symmetric(-128, 127);
  EXPECT_NEAR(qparams({-1.0, 1.47}, grid).scale, 0.0115294, 5e-8);
  EXPECT_NEAR(qparams({-99, 3}, grid).scale, 0.7764707, 2e-7);
  EXPECT_NEAR(qparams({-1, 2}, grid).scale, 0.0156863, 5e-8);
  const double lo[] = {-0.4881, -0.4944, 0.0787,  -0.2484, -0.4718,
                       -0.3689, -0.7511, -0.9156, -0.8159, -0.5301};
  const double hi[] = {-0.1213, 0.5284, 0.1981, 0.3239, -0.0056,
                       0.3312,  0.7511, 0.9156, 0.8159, 0.5301};
  const double want[] = {0.0038, 0.0041, 0.0016, 0.0025, 0.0037,
                         0.0029, 0.0059, 0.0072, 0.0064, 0.0042};
  for (int i = 0; i < 10; ++i) {
    EXPECT_NEAR(qparams({lo[i], hi[i]}, grid).scale, want[i], 5e-5) << i;
    EXPECT_EQ(qparams({lo[i], hi[i]}, grid).zero_point, 0);
  }
  EXPECT_EQ(qparams({-3, 127}, symmetric(-127, 127)).scale, 1.0f);
  EXPECT_EQ(qparams({-127, 3}, symmetric(-127, 127)).scale, 1.0f);
  EXPECT_EQ(qparams({0, 32767.5}, symmetric(-32768, 32767)).scale, 1.0f);
  EXPECT_EQ(qparams({0, 7.5}, symmetric(-8, 7)).scale, 1.0f);
}

TEST(QParamsGolden, UnsignedSymmetricLeavesNegativeValuesOut) {
  EXPECT_EQ(qparams({-1000, 255}, symmetric(0, 255)).scale, 1.0f);
  EXPECT_EQ(qparams({-1000, 255}, symmetric(0, 255)).zero_point, 0);
  EXPECT_EQ(qparams({0, 7.5}, symmetric(0, 15)).scale, 0.5f);
}

TEST(QParamsGolden, TvmDividesByAPowerOfTwo) {
  EXPECT_EQ(qparams({-128, 4}, tvm(symmetric(-128, 127))).scale, 1.0f);
  EXPECT_EQ(qparams({-128, 4}, tvm(symmetric(-127, 127))).scale, 1.0f);
  EXPECT_EQ(qparams({-1, 8}, tvm(symmetric(-8, 7))).scale, 1.0f);
  EXPECT_EQ(qparams({-1, 256}, tvm(symmetric(0, 255))).scale, 1.0f);
  EXPECT_EQ(qparams({-1, 0.75}, tvm(symmetric(-128, 127))).scale, 1 / 128.0f);
}

TEST(QParamsGolden, AffineHoldsZero) {
  const QParams q = qparams({-1, 2}, affine(0, 255));
  EXPECT_EQ(q.scale, static_cast<float>(3 / 255.0));
  EXPECT_EQ(q.zero_point, 85);
  EXPECT_EQ(qparams({-1, 2}, affine(-128, 127)).zero_point, -43);
  EXPECT_EQ(qparams({2, 5.1}, affine(0, 255)).scale, static_cast<float>(5.1 / 255));
  EXPECT_EQ(qparams({2, 5.1}, affine(0, 255)).zero_point, 0);
  EXPECT_EQ(qparams({-5.1, -2}, affine(0, 255)).scale, static_cast<float>(5.1 / 255));
  EXPECT_EQ(qparams({-5.1, -2}, affine(0, 255)).zero_point, 255);
  EXPECT_EQ(qparams({0, 1}, affine(-128, 127)).zero_point, -128);
  EXPECT_EQ(qparams({-1, 0}, affine(-128, 127)).zero_point, 127);
}

// Ties of the zero point go to the even code.
TEST(QParamsGolden, ZeroPointRoundsHalfToEven) {
  EXPECT_EQ(qparams({-1.5, 253.5}, affine(0, 255)).zero_point, 2);
  EXPECT_EQ(qparams({-2.5, 252.5}, affine(0, 255)).zero_point, 2);
  EXPECT_EQ(qparams({-127.5, 127.5}, affine(-128, 127)).zero_point, 0);
  EXPECT_EQ(qparams({-126.5, 128.5}, affine(-128, 127)).zero_point, -2);
}

TEST(QParamsGolden, PowerOfTwoRoundsUp) {
  // Ranges whose scale on [-127, 127] is the first number.
  const double scale[] = {0.9, 0.5, 0.3, 0.25, 0.0078, 0x1p-15, 3.0, 1.0};
  const float want[] = {1, 0.5f, 0.5f, 0.25f, 0.0078125f, 0x1p-15f, 4, 1};
  for (int i = 0; i < 8; ++i)
    EXPECT_EQ(qparams({-1e-9, 127 * scale[i]}, power_of_two(symmetric(-127, 127))).scale, want[i]);
  const double above = std::nextafter(0.5, 1.0);
  EXPECT_EQ(qparams({0, 127 * above}, power_of_two(symmetric(-127, 127))).scale, 1);
}

// With the scale rounded to 2^k the zero point of the range would clip the wider end.
TEST(QParamsGolden, PowerOfTwoTakesTheZeroPointFromTheScale) {
  const QParams q = qparams({-100, 200}, power_of_two(affine(0, 255)));
  EXPECT_EQ(q.scale, 2);
  EXPECT_EQ(q.zero_point, 50);
  EXPECT_EQ(qparams({-100, 200}, affine(0, 255)).zero_point, 85);
}

// The scale rounds to float32, but the zero point is that of the range: here they disagree.
TEST(QParamsGolden, ZeroPointComesFromTheRangeNotTheRoundedScale) {
  std::mt19937 random(1);
  std::uniform_real_distribution<double> uniform(1, 100);
  int differ = 0;
  for (int i = 0; i < 1000; ++i) {
    // -lo·65535/(hi-lo) = k + 1/2 to within 1e-9.
    const int code = static_cast<int>(random() % 65535);
    const double width = uniform(random), lo = -(code + 0.5 - 1e-7) * width / 65535;
    const QParams q = qparams({lo, lo + width}, affine(0, 65535));
    ASSERT_EQ(q.zero_point, code);
    differ += std::lrint(-lo / q.scale) != q.zero_point ? 1 : 0;
  }
  EXPECT_GT(differ, 100);
}

// ---- dead and invalid ----

TEST(QParams, DeadGivesScaleOne) {
  for (const Grid& grid : kGrids) {
    EXPECT_TRUE(is_dead({0, 0}, grid));
    EXPECT_TRUE(is_dead({-0.0, 0}, grid));
    for (const Grid& variant : {grid, power_of_two(grid)}) {
      EXPECT_EQ(qparams({0, 0}, variant).scale, 1);
      EXPECT_EQ(qparams({0, 0}, variant).zero_point, 0);
    }
    EXPECT_FALSE(is_dead({0, 0x1p-149}, grid));
    const bool leaves_negative_out = grid.symmetric && grid.is_unsigned();
    EXPECT_EQ(is_dead({-3, -1}, grid), leaves_negative_out);
    EXPECT_EQ(is_dead({-3, 0}, grid), leaves_negative_out);
  }
  EXPECT_EQ(qparams({-3, -1}, symmetric(0, 255)).scale, 1);
  EXPECT_EQ(qparams({-3, 0}, tvm(symmetric(0, 255))).scale, 1);
}

TEST(QParams, AnInvalidRangeGivesNan) {
  const double inf = kInf, nan = std::nan("");
  for (const Grid& grid : kGrids)
    for (const Range& range : {Range{-inf, 1}, Range{0, inf}, Range{-inf, inf}, Range{nan, 1},
                               Range{0, nan}, Range{nan, nan}, Range{2, 1}, Range{inf, -inf}}) {
      EXPECT_TRUE(std::isnan(qparams(range, grid).scale));
      EXPECT_EQ(qparams(range, grid).zero_point, 0);
    }
}

// ---- floor and cap ----

TEST(QParams, ScaleIsAtLeastTheLeastNormal) {
  for (const Grid& grid : kGrids)
    for (const double hi : {0x1p-149, 0x1p-140, 0x1p-127, 0x1p-126, 0x1p-120 * 0.9})
      for (const Grid& variant : {grid, power_of_two(grid)}) {
        const QParams q = qparams({-hi / 2, hi}, variant);
        ASSERT_GE(q.scale, kLeast);
        EXPECT_GE(q.zero_point, grid.quant_min);
        EXPECT_LE(q.zero_point, grid.quant_max);
      }
  EXPECT_EQ(qparams({0, 0x1p-140}, symmetric(-128, 127)).scale, kLeast);
  EXPECT_EQ(qparams({0, 0x1p-140}, power_of_two(symmetric(-128, 127))).scale, kLeast);
  // Just above the floor nothing is rounded.
  EXPECT_EQ(qparams({0, 127 * 0x1.8p-126}, symmetric(-127, 127)).scale, 0x1.8p-126f);
}

// A floored scale is far wider than the range: its own zero point would put 0 in the wrong place.
TEST(QParams, AFlooredScaleGivesTheZeroPoint) {
  const QParams q = qparams({-0x1p-124, 0x1p-124}, affine(0, 255));
  EXPECT_EQ(q.scale, kLeast);
  EXPECT_EQ(q.zero_point, 4);
  EXPECT_EQ(qparams({-0x1p-149, 0x1p-149}, affine(0, 255)).zero_point, 0);
}

TEST(QParams, FullRangeIsCappedAtTheLargestFiniteScale) {
  for (const Grid& grid : kGrids)
    for (const Range& range : {Range{-kMax, kMax}, Range{0, kMax}, Range{-kMax, 1},
                               Range{-kMax, -1}, Range{-1, kMax}, Range{-kMax / 2, kMax}}) {
      if (is_dead(range, grid)) continue;
      const QParams q = qparams(range, grid);
      ASSERT_TRUE(is_valid_scale(q.scale));
      ASSERT_TRUE(std::isfinite(largest_value(q, grid)));
      const QParams p = qparams(range, power_of_two(grid));
      ASSERT_TRUE(std::isfinite(largest_value(p, grid)));
      int exponent;
      EXPECT_EQ(std::frexp(p.scale, &exponent), 0.5f);
    }
  // 128 · 2·max/255 would be infinite; the cap is the last scale where it is not.
  const Grid grid = symmetric(-128, 127);
  const QParams q = qparams({-kMax, kMax}, grid);
  EXPECT_EQ(q.scale, std::nextafter(0x1p121f, 0.0f));
  EXPECT_TRUE(std::isinf(128 * std::nextafter(q.scale, kInf)));
  EXPECT_EQ(qparams({-kMax, kMax}, power_of_two(grid)).scale, 0x1p120f);
  EXPECT_EQ(qparams({-kMax, kMax}, power_of_two(symmetric(-127, 127))).scale, 0x1p121f);
  EXPECT_EQ(qparams({-kMax, kMax}, affine(0, 1)).scale, kMax);
}

// A cap keeps the zero point of the range: that of the smaller scale could make a value infinite.
TEST(QParams, TheCapLeavesTheZeroPointAlone) {
  const Grid grid = affine(-128, 127);
  EXPECT_EQ(qparams({-kMax, kMax}, grid).zero_point, 0);
  EXPECT_EQ(qparams({-kMax, 1}, grid).zero_point, 127);
  EXPECT_EQ(qparams({0, kMax}, grid).zero_point, -128);
  EXPECT_EQ(qparams({-kMax, kMax}, affine(0, 255)).zero_point, 128);
  // With powers of two it is that of the scale before the cap: 2^122, and -127 + 64.
  const QParams q = qparams({-kMax, kMax}, power_of_two(affine(-127, 127)));
  EXPECT_EQ(q.zero_point, -63);
  EXPECT_EQ(q.scale, 0x1p120f);
}

// The cap is sharp: the next larger scale (or power of two) would give an infinite value.
TEST(QParams, TheCapIsTheLargestSuchScale) {
  std::mt19937 random(4);
  for (const Grid& grid : kGrids)
    for (int i = 0; i < 200; ++i) {
      const int32_t width = grid.quant_max - grid.quant_min;
      const int32_t zero_point =
          grid.symmetric ? 0 : grid.quant_min + static_cast<int32_t>(random() % (width + 1));
      QParams q{largest_scale(grid, zero_point), zero_point};
      ASSERT_TRUE(std::isfinite(largest_value(q, grid))) << zero_point;
      const QParams next{std::nextafter(q.scale, kInf), zero_point};
      ASSERT_TRUE(std::isinf(largest_value(next, grid))) << zero_point;
      q.scale = largest_scale(power_of_two(grid), zero_point);
      ASSERT_TRUE(std::isfinite(largest_value(q, grid)));
      q.scale *= 2;
      ASSERT_TRUE(std::isinf(largest_value(q, grid)));
    }
}

// ---- laws on random ranges ----

class RandomRanges {
 public:
  Range next() {
    const double a = draw(), b = draw();
    return {std::fmin(a, b), std::fmax(a, b)};
  }

 private:
  double draw() {
    std::uniform_real_distribution<double> mantissa(-1, 1), exponent(-149, 128);
    const double value = std::ldexp(mantissa(random_), static_cast<int>(exponent(random_)));
    return static_cast<float>(value);
  }
  std::mt19937_64 random_{5};
};

TEST(QParamsLaw, NoCodeIsInfiniteAndZeroIsExact) {
  RandomRanges ranges;
  for (int i = 0; i < 2000; ++i) {
    const Range range = ranges.next();
    for (const Grid& grid : kGrids)
      for (const Grid& variant : {grid, power_of_two(grid)}) {
        const QParams q = qparams(range, variant);
        ASSERT_TRUE(is_valid_scale(q.scale));
        ASSERT_TRUE(is_dead(range, grid) || q.scale >= kLeast);
        ASSERT_TRUE(std::isfinite(largest_value(q, grid)));
        if (grid.quant_min > 0 && grid.symmetric) continue;
        const UnitGrid<float> unit = make_unit_grid<float>(q.scale, q.zero_point, grid);
        if (!is_dead(range, grid)) {
          ASSERT_EQ(dequantize(quantize(0.0f, unit), unit), 0);
        }
      }
  }
}

// Every value of the range lies within half a step of a code, but for the cap and the left-out
// sign.
TEST(QParamsLaw, TheGridCoversTheRange) {
  RandomRanges ranges;
  for (int i = 0; i < 2000; ++i) {
    const Range range = ranges.next();
    if (range.hi > 1e37 || range.lo < -1e37) continue;
    for (const Grid& grid : kGrids)
      for (const Grid& variant : {grid, power_of_two(grid)}) {
        if (is_dead(range, grid)) continue;
        const QParams q = qparams(range, variant);
        const double slack = q.scale * (1 + (grid.quant_max - grid.quant_min) * 1e-6);
        if (grid.scale_rule == ScaleRule::grid) {
          ASSERT_GE(value_of(grid.quant_max, q) + slack, range.hi);
        }
        if (!grid.is_unsigned() || !grid.symmetric) {
          ASSERT_LE(value_of(grid.quant_min, q) - slack, range.lo);
        }
      }
  }
}

TEST(QParamsLaw, ScalingTheRangeByAPowerOfTwoScalesTheScale) {
  std::mt19937_64 random(6);
  std::uniform_real_distribution<double> uniform(-1, 1);
  for (int i = 0; i < 500; ++i) {
    const double a = uniform(random), b = uniform(random);
    const Range range{std::fmin(a, b), std::fmax(a, b)};
    for (const Grid& grid : kGrids)
      for (const Grid& variant : {grid, power_of_two(grid)})
        for (const int shift : {-60, -1, 3, 60}) {
          if (is_dead(range, grid)) continue;
          const QParams q = qparams(range, variant);
          const QParams s =
              qparams({std::ldexp(range.lo, shift), std::ldexp(range.hi, shift)}, variant);
          ASSERT_EQ(s.scale, std::ldexp(q.scale, shift));
          ASSERT_EQ(s.zero_point, q.zero_point);
        }
  }
}

// The formulas in long double, away from floor and cap.
TEST(QParamsLaw, EqualsTheFormula) {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> uniform(-10, 10);
  for (int i = 0; i < 2000; ++i) {
    const double a = uniform(random), b = uniform(random);
    const Range range{std::fmin(a, b), std::fmax(a, b)};
    for (const Grid& grid : kGrids) {
      if (is_dead(range, grid)) continue;
      const long double lo = std::fmin(range.lo, 0.0), hi = std::fmax(range.hi, 0.0);
      const long double width = static_cast<long double>(grid.quant_max) - grid.quant_min;
      const long double bound = grid.is_unsigned() ? hi : std::fmax(-lo, hi);
      long double scale = grid.is_unsigned() ? bound / grid.quant_max : 2 * bound / width;
      if (grid.scale_rule == ScaleRule::tvm) scale = bound / (grid.is_unsigned() ? 256 : 128);
      if (!grid.symmetric) scale = (hi - lo) / width;
      const QParams q = qparams(range, grid);
      ASSERT_EQ(q.scale, static_cast<float>(static_cast<double>(scale)));
      const long double zero_point = std::nearbyint(grid.quant_min - lo / scale);
      ASSERT_EQ(q.zero_point, grid.symmetric ? 0 : static_cast<int32_t>(zero_point));
      const long double up = std::exp2(std::ceil(std::log2(scale)));
      const QParams p = qparams(range, power_of_two(grid));
      ASSERT_EQ(p.scale, static_cast<float>(up));
      const long double from_scale =
          std::fmin(std::nearbyint(grid.quant_min - lo / up), grid.quant_max);
      ASSERT_EQ(p.zero_point, grid.symmetric ? 0 : static_cast<int32_t>(from_scale));
    }
  }
}

}  // namespace
