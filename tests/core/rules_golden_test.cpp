#include <gtest/gtest.h>

#include <cmath>

#include "solving.h"

// Ranges worked out by hand. All values are edges of bins, so the histogram keeps them exactly.
namespace {

using namespace torch_ext;
using namespace solving;
using statistic_plain::kInfinity;

// `count` times `value`, for each pair.
Values repeated(std::initializer_list<std::pair<float, int>> parts) {
  Values values;
  for (const auto& [value, count] : parts) values.insert(values.end(), count, value);
  return values;
}

// from, from + 1, .. to.
Values numbers(int from, int to) {
  Values values;
  for (int i = from; i <= to; ++i) values.push_back(static_cast<float>(i));
  return values;
}

// The range, the same with one thread as with several.
template <class R>
Solved solved(const Values& values, const Grid& grid, const std::vector<double>& options) {
  Memory memory = observed(values);
  cpu::test_threads() = 1;
  const Solved serial = solve<R>(memory, grid, options);
  cpu::test_threads() = 3;
  EXPECT_TRUE(solve<R>(memory, grid, options) == serial);
  cpu::test_threads() = 2;
  return serial;
}

template <class R>
void expect_range(const Values& values, const Grid& grid, double lo, double hi,
                  const std::vector<double>& options = defaults<R>()) {
  const Solved have = solved<R>(values, grid, options);
  EXPECT_FLOAT_EQ(have.range[0], static_cast<float>(lo));
  EXPECT_FLOAT_EQ(have.range[1], static_cast<float>(hi));
}

// Where no irrational number takes part.
template <class R>
void expect_exact(const Values& values, const Grid& grid, double lo, double hi,
                  const std::vector<double>& options = defaults<R>()) {
  const Solved have = solved<R>(values, grid, options);
  EXPECT_EQ(have.range[0], static_cast<float>(lo));
  EXPECT_EQ(have.range[1], static_cast<float>(hi));
}

TEST(MinMax, IsTheRangeOfTheFiniteValues) {
  expect_exact<observers::MinMax>({-3, 5, 1}, kInt8, -3, 5);
  expect_exact<observers::MinMax>({0.1f}, kInt8, 0.1f, 0.1f);
  expect_exact<observers::MinMax>({-kInfinity, std::nanf(""), 2, -7}, kInt8, -7, 2);
}

TEST(FixedScale, IsTheRangeThatItsGridRepresents) {
  expect_exact<observers::FixedScale>({}, kInt8, -64, 63.5, {0.5, 0});
  expect_exact<observers::FixedScale>({1e9f}, kUint8Affine, -2.5, 61.25, {0.25, 10});
  const Solved given = solved<observers::FixedScale>({}, kUint8Affine, {0.1, 10});
  EXPECT_EQ(given.scale[0], 0.1f);
  EXPECT_EQ(given.zero_point[0], 10);
}

TEST(Clip, KeepsTheRangeWithinItsBounds) {
  expect_exact<observers::Clip>({-3, 0.5f, 7}, kInt8, -1, 1);
  expect_exact<observers::Clip>({-0.25f, 0.5f}, kInt8, -0.25, 0.5);
  expect_exact<observers::Clip>({5, 6}, kInt8, 4, 4, {-2, 4});
}

TEST(Percentile, SymmetricIsTheRankOfTheMagnitude) {
  using P = observers::Percentile;
  expect_exact<P>(numbers(1, 100), kInt8, 1, 90, {90});
  expect_exact<P>(numbers(1, 100), kInt8, 1, 90, {89.5});        // ceil(89.5) = 90
  expect_exact<P>(numbers(1, 100), kInt8, 1, 91, {90.0000001});  // ceil(90.0000001) = 91
  expect_exact<P>(numbers(1, 100), kInt8, 1, 100, {99.99});
  expect_exact<P>(numbers(-100, -1), kInt8, -50, -1, {50});
  expect_exact<P>(numbers(-50, 49), kInt8, -49, 49, {98});  // |x|: 0, 1, 1, .. 49, 49, 50
}

// Values inside a bin: other ranks give its edge of least magnitude, the last one the value itself.
TEST(Percentile, TheLastRankIsExactlyTheExtremum) {
  using P = observers::Percentile;
  const float inside = 1 + 0x1.8p-10f;  // in the bin [1 + 2^-10, 1 + 2^-9)
  expect_exact<P>({0.5f, inside}, kInt8, 0.5, inside, {100});
  expect_exact<P>({0.5f, inside, 4}, kInt8, 0.5, 1 + 0x1p-10, {50});
  expect_exact<P>({-inside, 0.5f, inside}, kUint8Affine, -inside, inside, {100});
}

TEST(Percentile, AmongZerosIsTheBottomOfTheWindow) {
  using P = observers::Percentile;
  const Values values = repeated({{0, 90}, {4, 10}});
  expect_exact<P>(values, kInt8, 0, 0x1p-13, {90});  // octaves 2^-13 .. 2^2
  expect_exact<P>(values, kInt8, 0, 4, {90.1});
}

TEST(Percentile, AffineIsARankFromEachEnd) {
  using P = observers::Percentile;
  expect_exact<P>(numbers(1, 100), kUint8Affine, 6, 95, {90});  // k_hi 95, k_lo 6
  expect_exact<P>(numbers(-99, 0), kUint8Affine, -94, -5, {90});
  expect_exact<P>(repeated({{0, 90}, {4, 10}}), kUint8Affine, 0, 4, {95});
  // Both ranks are zeros though the data are not: the range of the data.
  expect_exact<P>(repeated({{-1, 1}, {0, 98}, {2, 1}}), kUint8Affine, -1, 2, {90});
}

TEST(ClipStd, IsMeanAndDeviationsWithinTheData) {
  using C = observers::ClipStd;
  const double sigma = std::sqrt(5.0 / 3);  // of 1, 2, 3, 4 with N - 1
  expect_range<C>({1, 2, 3, 4}, kInt8, 2.5 - sigma, 2.5 + sigma, {1});
  expect_exact<C>({1, 2, 3, 4}, kInt8, 1, 4, {3});
  expect_exact<C>({0, 0, 0, 8}, kInt8, 0, 6, {1});  // mean 2, deviation 4
  expect_exact<C>({-8, 0, 0, 0}, kUint8Affine, -4, 0, {0.5});
  expect_exact<C>({7.7f}, kInt8, 7.7f, 7.7f);
}

TEST(MeanAbs, IsTheRangeOfLearnedStepSizesFirstScale) {
  using M = observers::MeanAbs;
  constexpr Grid kInt3{{-4, 4}, true, core::ScaleRule::grid, false};
  expect_exact<M>({-1, 2, 3, 0, -4}, kInt3, -8, 8);  // scale 2 * 2 / sqrt(4), width 8
  constexpr Grid kFour{{0, 4}, true, core::ScaleRule::grid, false};
  expect_exact<M>({-1, 2, 3, 0, -4}, kFour, 0, 8);
  expect_exact<M>({-1, -3}, kFour, 0, 0);
  constexpr Grid kFourAffine{{0, 4}, false, core::ScaleRule::grid, false};
  expect_exact<M>({1, 3}, kFourAffine, 0, 8);
  expect_exact<M>({-1, -3}, kFourAffine, -8, 0);
  expect_exact<M>({-1, 3}, kFourAffine, -4, 4);
  expect_exact<M>({-0x1.fffffep127f}, kInt8, -0x1.fffffep127f, 0x1.fffffep127f);
}

// Levels -T, 0, T. One threshold for 1, 1, 1, 2: 3 (T-1)^2 + (2-T)^2 is least at 5/4, a candidate.
TEST(Mse, BalancesClippingAndRounding) {
  expect_exact<observers::Mse>({1, 1, 1, 2}, kTernary, 1, 1.25);
  expect_exact<observers::Mse>({-1, -1, -1, -2}, kTernary, -1.25, -1);
}

// Levels 0, T/3, 2T/3, T. T = 3 leaves only the error 1 of the value 4; the next candidate, 3 +
// 1/64, costs 1400 / 64^2 / 9 = 0.038 to gain 0.031.
TEST(Mse, HitsLevelsExactly) {
  const Grid levels{{0, 3}, true, ScaleRule::grid, false};
  expect_exact<observers::Mse>(repeated({{1, 100}, {2, 100}, {3, 100}, {4, 1}}), levels, 1, 3);
}

// Of one value no candidate has half of the values below it and lies below max|x|.
TEST(Kl, KeepsAConstant) {
  expect_exact<observers::Kl>(Values(50, 1.75f), kInt8, 1.75, 1.75);
  expect_exact<observers::Kl>(Values(50, -1.75f), kUint8Affine, -1.75, -1.75);
}

// Two levels. For every T < 1 all mass falls into the one bin that 1/2 lies in, which is its whole
// level: p = q = 1, divergence 0, no spare bins. The smallest T with half of the values below is
// next above 1/2. No edge of a bin, T i/16, lies between 1/2 and 1/2 + 2^-11 and would split it.
TEST(Kl, TakesTheSmallestOfEqualDivergences) {
  expect_exact<observers::Kl>({0.5f, 0.5f, 0.5f, 1}, kInt2, 0.5, 129.0 / 256);
  expect_exact<observers::Kl>({-1, 0, 0.5f, 0.5f, -0.5f}, kInt2, -129.0 / 256, 0.5);
}

// Scale T, levels -T, 0, T. Squared errors of 1 (9990 times) and 5/4 (10 times): T = 1, the
// percentile 99.9: 10/16. kl, T = 129/128: 9990/128^2 + 10 (31/128)^2 = 1.2. min_max: 9990/16.
TEST(Mix, TakesThePercentileOfLeastError) {
  expect_exact<observers::Mix>(repeated({{1, 9990}, {1.25f, 10}}), kTernary, 1, 1);
}

// 1, 1, 1, 2: percentiles and min_max are 2, error 3; kl is 129/128, error 3/128^2 + (127/128)^2.
TEST(Mix, TakesKlWhereItsErrorIsLeast) {
  expect_exact<observers::Mix>({1, 1, 1, 2}, kTernary, 1, 129.0 / 128);
}

// Of 2000001 values even the percentile 99.9999, rank 1999999, is 1, and kl is 129/128. Two million
// errors of 1 cost less than one of 29999: the outlier stays.
TEST(Mix, TakesMinMaxWhereItsErrorIsLeast) {
  expect_exact<observers::Mix>(repeated({{1, 2000000}, {30000, 1}}), kTernary, 1, 30000);
}

// 2 bits: 1.710635168 sigma with sigma^2 = 128/63, error 63.2; 2.830682989 mean|x| reaches 0.71
// only, error 106.
TEST(Aciq, TakesGaussWhereItsErrorIsLess) {
  const double reach = 1.710635168 * std::sqrt(128.0 / 63);
  expect_range<observers::Aciq>(repeated({{0, 62}, {-8, 1}, {8, 1}}), kInt2, -reach, reach);
}

// 4 bits around the mean 1/16: Laplace reaches 5.028640136 mean|x-mu| = 5.028640136 * 37/32, error
// 9.2; Gauss, 2.559136462 * 3/2, leaves more of 8 out, error 19.1.
TEST(Aciq, TakesLaplaceWhereItsErrorIsLess) {
  const Values values = repeated({{-4, 1}, {-1, 31}, {1, 31}, {8, 1}});
  expect_range<observers::Aciq>(values, kInt4, -4, 0.0625 + 5.028640136 * 37 / 32);
}

// One-sided on an unsigned grid of 4 bits: mean 0 and the constants of 5 bits. Laplace, 6.204766334
// * 39/32, error 0.19; Gauss, 2.936200612 sqrt(95/32), error 8.7.
TEST(Aciq, OneSidedDataHasOneBitMore) {
  expect_range<observers::Aciq>(repeated({{1, 31}, {8, 1}}), kUint4, 1, 6.204766334 * 39 / 32);
}

}  // namespace
