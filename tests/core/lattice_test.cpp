#include "core/lattice.h"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "search_plain.h"

namespace {

using namespace torch_ext::core;
using statistic_plain::kKinds;
using statistic_plain::kLayouts;
using statistic_plain::Random;
using statistic_plain::Values;
using view_plain::Built;
using view_plain::Real;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(Lattice, HoldsTheCandidatesOfTheDefinition) {
  Random random(11);
  for (const auto kind : kKinds) {
    for (const HistogramLayout layout : kLayouts) {
      for (const int n : {1, 2, 7, 300}) {
        const Built built(statistic_plain::sample(kind, n, random), layout, Needs::counts);
        const Lattice lattice = make_lattice(built.view);
        const std::vector<Real> want = search_plain::candidates(built.atoms, layout.octaves);
        ASSERT_EQ(lattice.count, static_cast<int64_t>(want.size())) << static_cast<int>(kind);
        for (int64_t i = 0; i < lattice.count; ++i)
          ASSERT_EQ(lattice_value(lattice.bottom, lattice.first + i), want[i]) << i;
        EXPECT_LE(lattice.count, lattice_size(layout));
      }
    }
  }
}

TEST(Lattice, EndsAtTheFirstThresholdThatReachesTheData) {
  const auto last = [](const Values& values) {
    const Built built(values, {7, 12}, Needs::counts);
    const Lattice lattice = make_lattice(built.view);
    EXPECT_GT(lattice.count, 0);
    return lattice_value(lattice.bottom, lattice.first + lattice.count - 1);
  };
  EXPECT_EQ(last({0.5f, 0.5f, 0.5f, 1.5f}), 1.5);                 // on the lattice
  EXPECT_EQ(last({0.5f, 0.5f, 0.5f, -1.501f}), 1.5 + 1.0 / 128);  // the next
  EXPECT_EQ(last({0.5f, 0.5f, 0.5f, 1.0f}), 1.0);                 // 2^-1 (1 + 128/128)
  EXPECT_EQ(last({0.5f, 0.5f, 0.5f, 1.9999f}), 2.0);
}

TEST(Lattice, IsEmptyWithoutWindowOrSpread) {
  for (const Values& values :
       {Values{}, Values{0, -0.0f}, Values{1e-40f, -1e-42f}, Values{1.0f, 1.0f}, Values{-0.25f}}) {
    const Built built(values, {7, 12}, Needs::counts);
    EXPECT_EQ(make_lattice(built.view).count, 0);
  }
}

TEST(Lattice, CandidatesStartWhereHalfOfTheNonzeroValuesLieBelow) {
  // 4 of 8 non-zero values in [1, 1 + 2^-7), zeros do not count: T = 1 + 1/128 is the first.
  Values values(100, 0.0f);
  for (const float x : {1.0f, -1.0f, 1.0f, -1.0f, 1.5f, 1.5f, 1.5f, 1.5f}) values.push_back(x);
  const Built half(values, {7, 12}, Needs::counts);
  EXPECT_EQ(lattice_value(half.view.bottom, make_lattice(half.view).first), 1 + 1.0 / 128);
  values.push_back(1.5f);
  const Built less(values, {7, 12}, Needs::counts);
  EXPECT_EQ(lattice_value(less.view.bottom, make_lattice(less.view).first), 1.5 + 1.0 / 128);
}

TEST(FirstWhere, FindsTheBorderOfEverySplit) {
  for (int64_t size = 0; size <= 20; ++size)
    for (int64_t border = 0; border <= size; ++border)
      EXPECT_EQ(first_where(size, [&](int64_t i) { return i >= border; }), border);
}

int64_t least(const std::vector<double>& objective, bool last = false) {
  return argmin(objective.data(), static_cast<int64_t>(objective.size()), last);
}

TEST(Argmin, TakesTheSmallestOfTies) {
  EXPECT_EQ(least({3, 1, 2, 1}), 1);
  EXPECT_EQ(least({3, 1, 2, 1}, true), 3);
  EXPECT_EQ(least({5}), 0);
}

TEST(Argmin, TiesReachOneInTenToTheTwelfth) {
  EXPECT_EQ(least({100 + 0.9e-10, 100}), 0);
  EXPECT_EQ(least({100 + 1.2e-10, 100}), 1);
  EXPECT_EQ(least({-100 + 0.9e-10, -100}), 0);
  EXPECT_EQ(least({-100 + 1.2e-10, -100}), 1);
  EXPECT_EQ(least({0.9e-14, 0}), 0);
  EXPECT_EQ(least({1.1e-14, 0}), 1);
}

// The bound belongs to the least of all, not to a running least.
TEST(Argmin, TiesAreMeasuredFromTheLeast) {
  EXPECT_EQ(least({1 + 1.5e-12, 1 + 0.8e-12, 1}), 1);
  EXPECT_EQ(least({1, 1 + 0.8e-12, 1 + 1.5e-12}, true), 1);
}

TEST(Argmin, NeedsAFiniteObjective) {
  EXPECT_EQ(least({}), -1);
  EXPECT_EQ(least({kInfinity, kInfinity}), -1);
  EXPECT_EQ(least({std::numeric_limits<double>::quiet_NaN(), kInfinity}), -1);
  EXPECT_EQ(least({kInfinity, std::numeric_limits<double>::quiet_NaN(), 7}), 2);
}

TEST(RangeOfThreshold, ClampsBothEnds) {
  View view{};
  view.min = -3;
  view.max = 5;
  const auto expect = [&](double t, double lo, double hi) {
    const Range range = range_of_threshold(view, t);
    EXPECT_EQ(range.lo, lo) << t;
    EXPECT_EQ(range.hi, hi) << t;
  };
  expect(10, -3, 5);
  expect(4, -3, 4);
  expect(2, -2, 2);
  expect(0, 0, 0);
  view.min = 3;
  expect(4, 3, 4);
  expect(2, 2, 2);
}

}  // namespace
