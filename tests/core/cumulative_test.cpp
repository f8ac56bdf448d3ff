#include "core/cumulative.h"

#include <gtest/gtest.h>

#include <functional>

#include "view_plain.h"

namespace {

using namespace torch_ext::core;
using statistic_plain::between;
using statistic_plain::kKinds;
using statistic_plain::kLayouts;
using statistic_plain::Random;
using view_plain::Built;
using view_plain::Real;

// How often each of up to 500 values is there: up to the most that a tally holds.
constexpr int64_t kCopies[] = {1, (int64_t{1} << 31) + 5, 18'000'000'000'000'001};

// check(view of random values) for every kind of data, layout and some sizes.
void for_views(Needs needs, uint64_t seed,
               const std::function<void(const Built&, Random&)>& check) {
  Random random(seed);
  for (const auto kind : kKinds) {
    for (const HistogramLayout layout : kLayouts) {
      for (const int n : {1, 20, 500}) {
        for (const int64_t copies : kCopies) {
          SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)) + ", " + std::to_string(n) +
                       " values " + std::to_string(copies) + " times, layout " +
                       std::to_string(layout.mantissa_bits) + ", " +
                       std::to_string(layout.octaves));
          const Built built(statistic_plain::sample(kind, n, random), layout, needs, copies);
          check(built, random);
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

// Sum of fn(edge) over the values of a sign in bins [begin, end).
template <class Fn>
Real sum_between(const Built& built, Sign sign, int64_t begin, int64_t end, const Fn& fn) {
  Real total = 0;
  if (begin >= end) return total;
  const auto& side = built.atoms.side[sign];
  const auto stop = side.upper_bound(built.view.value(end - 1));
  for (auto it = side.lower_bound(built.view.value(begin)); it != stop; ++it)
    total += it->second * fn(it->first);
  return total;
}

// Within `relative` of the want, or of `size` where terms of that size may cancel.
void expect_close(Real have, Real want, Real relative, Real size = 0) {
  const Real slack = relative * std::max(std::fabs(want), size);
  ASSERT_LE(std::fabs(have - want), slack) << "have " << have << ", want " << want;
}

TEST(View, TellsWhatWasSeen) {
  for_views(Needs::counts, 21, [](const Built& b, Random&) {
    EXPECT_EQ(b.view.finite, b.atoms.finite);
    EXPECT_EQ(b.view.zeros, b.atoms.zeros);
    EXPECT_EQ(b.view.tiny, b.atoms.tiny);
    EXPECT_EQ(nonzero(b.view), b.atoms.nonzero);
    EXPECT_EQ(b.view.min, b.atoms.min);
    EXPECT_EQ(b.view.max, b.atoms.max);
    EXPECT_EQ(b.view.largest(), b.atoms.largest());
    EXPECT_EQ(b.view.one_sided(), b.atoms.min >= 0 || b.atoms.max <= 0);
    EXPECT_EQ(b.view.floor(), b.atoms.floor);
  });
}

TEST(View, ValuesAreEdgesOfLeastMagnitude) {
  for_views(Needs::counts, 22, [](const Built& b, Random&) {
    const int m = b.view.layout.mantissa_bits;
    for (int64_t i = 0; i < b.view.bins; ++i) {
      const Real octave = b.atoms.floor * std::ldexp(Real{1}, static_cast<int>(i >> m));
      ASSERT_EQ(b.view.value(i), octave + octave * std::ldexp(Real{1}, -m) * (i % (1 << m)));
    }
  });
}

TEST(View, PrefixesCountBothSigns) {
  for_views(Needs::counts, 23, [](const Built& b, Random&) {
    int64_t below[2] = {0, 0};
    for (int64_t i = 0; i <= b.view.bins; ++i) {
      for (int sign = 0; sign < 2; ++sign) ASSERT_EQ(b.view.below[sign][i], below[sign]) << i;
      ASSERT_EQ(b.view.magnitude[i], b.atoms.tiny + below[0] + below[1]) << i;
      if (i == b.view.bins) break;
      for (int sign = 0; sign < 2; ++sign) {
        const auto entry = b.atoms.side[sign].find(b.view.value(i));
        below[sign] += entry == b.atoms.side[sign].end() ? 0 : entry->second;
      }
    }
    EXPECT_EQ(below[0] + below[1] + b.atoms.tiny, b.atoms.nonzero);
  });
}

// Thresholds on edges, beside them, and anywhere in and around the window.
std::vector<double> thresholds(const View& view, Random& random) {
  std::vector<double> t = {0, 1e-300, view.floor() / 2, view.floor(), 1e300, 2 * view.largest()};
  for (int i = 0; i < 40; ++i) {
    const double spread = std::ldexp(1.0, static_cast<int>(between(-2, 33, random)));
    t.push_back(view.floor() * spread * (1 + static_cast<double>(random() >> 12) * 0x1p-52));
    if (view.bins == 0) continue;
    const double edge = view.value(between(0, view.bins - 1, random));
    t.insert(t.end(), {edge, std::nextafter(edge, 0.0), std::nextafter(edge, 1e300)});
  }
  return t;
}

TEST(View, PositionCountsTheBinsBelow) {
  for_views(Needs::counts, 24, [](const Built& b, Random& random) {
    std::vector<double> edges;
    for (int64_t i = 0; i < b.view.bins; ++i) edges.push_back(b.view.value(i));
    for (const double t : thresholds(b.view, random)) {
      const auto want = std::lower_bound(edges.begin(), edges.end(), t) - edges.begin();
      ASSERT_EQ(b.view.position(t), want) << t;
    }
  });
}

TEST(View, CountsAreLinearInsideABin) {
  for_views(Needs::counts, 25, [](const Built& b, Random& random) {
    for (const double t : thresholds(b.view, random)) {
      SCOPED_TRACE(t);
      expect_close(b.view.count_below(t), b.atoms.count_below(t), 1e-15L, 1e-300L * b.atoms.finite);
      if (testing::Test::HasFatalFailure()) return;
    }
    EXPECT_EQ(b.view.count_below(2 * b.view.largest() + 1e-37), b.atoms.nonzero);
  });
}

TEST(View, SumsAreMomentsOfTheAtoms) {
  for_views(Needs::moments, 26, [](const Built& b, Random&) {
    const Real size = b.atoms.sum([](Real x) { return std::fabs(x); });
    expect_close(b.view.sum, b.atoms.sum([](Real x) { return x; }), 1e-14L, size);
    expect_close(b.view.squares, b.atoms.sum([](Real x) { return x * x; }), 1e-14L);
  });
}

TEST(View, SquaredErrorIsThatOfTheAtoms) {
  for_views(Needs::moments, 27, [](const Built& b, Random& random) {
    if (b.view.bins == 0) return;
    for (int trial = 0; trial < 30; ++trial) {
      const auto sign = static_cast<Sign>(trial % 2);
      const int64_t begin = between(0, b.view.bins, random);
      const int64_t end = between(begin, b.view.bins, random);
      const double near = b.view.value(between(0, b.view.bins - 1, random));
      for (const double v : {0.0, near, near * 1.00003, b.view.largest(), 9 * b.view.largest()}) {
        const Real want =
            sum_between(b, sign, begin, end, [&](Real x) { return (x - v) * (x - v); });
        const Real unit = sum_between(b, sign, begin, end, [](Real x) { return x * x; });
        expect_close(squared_error(b.view, sign, begin, end, v), want, 1e-13L, 1e-16L * unit);
        if (testing::Test::HasFatalFailure()) return;
      }
      const Real want = sum_between(b, sign, begin, end, [](Real x) { return x; });
      expect_close(magnitude_sum(b.view, sign, begin, end), want, 1e-14L);
      if (testing::Test::HasFatalFailure()) return;
    }
  });
}

TEST(View, SquaredDeviationIsThatOfTheAtoms) {
  for_views(Needs::moments, 28, [](const Built& b, Random& random) {
    for (const double share : {0.0, 1.0, -1.0, 0.37, -0.001}) {
      const double mean = share * b.view.largest() * (1 + 1e-3 * static_cast<double>(random() % 9));
      const Real want = b.atoms.sum([&](Real x) { return (x - mean) * (x - mean); });
      expect_close(squared_deviation(b.view, mean), want, 1e-12L);
      if (testing::Test::HasFatalFailure()) return;
    }
  });
}

// 2^40 values beside 1: naive sums of squares about 0 would lose the whole deviation.
TEST(View, SquaredDeviationDoesNotCancel) {
  const HistogramLayout layout{10, 16};
  statistic_plain::State state = statistic_plain::observe({1.0f, 1.0009765625f}, layout);
  const int64_t n = int64_t{1} << 40;
  for (int64_t& count : state.counts) count *= n;
  state.tally[kFinite] = 2 * n;
  const float extrema[2] = {state.min, state.max};
  std::vector<int64_t> words(view_words(layout, Needs::moments));
  const View view = build_view(layout, Needs::moments, extrema, state.tally.data(),
                               state.counts.data(), words.data());
  const double mean = 1 + 0x1p-11;
  EXPECT_EQ(view.sum, 2 * mean * static_cast<double>(n));
  EXPECT_EQ(squared_deviation(view, mean), 2 * 0x1p-22 * static_cast<double>(n));
  EXPECT_EQ(squared_deviation(view, -mean),
            static_cast<double>(n) *
                ((1 + mean) * (1 + mean) + (1 + mean + 0x1p-10) * (1 + mean + 0x1p-10)));
}

TEST(View, ReadsNoMoreThanIsNeeded) {
  const HistogramLayout layout{7, 12};
  EXPECT_EQ(view_words(layout, Needs::nothing), 0);
  EXPECT_EQ(view_words(layout, Needs::extrema), 0);
  EXPECT_LT(view_words(layout, Needs::counts), view_words(layout, Needs::moments));
  const float extrema[2] = {-1.5f, 2.5f};
  const int64_t tally[kTallyColumns] = {3, 1, 0, 0, 0};
  const View view = build_view({0, 0}, Needs::extrema, extrema, tally, nullptr, nullptr);
  EXPECT_EQ(view.min, -1.5);
  EXPECT_EQ(view.max, 2.5);
  EXPECT_FALSE(view.one_sided());
}

// view_words() words of memory are enough, and none is unused.
TEST(View, StaysInsideItsMemory) {
  for (const HistogramLayout layout : kLayouts) {
    for (const Needs needs : {Needs::counts, Needs::moments}) {
      // A window of all octaves.
      const auto state = statistic_plain::observe({1e10f, -1.0f}, layout);
      const float extrema[2] = {state.min, state.max};
      constexpr int64_t kGuard = 0x7a5a5a5a5a5a5a5a;
      std::vector<int64_t> words(view_words(layout, needs) + 64, kGuard);
      build_view(layout, needs, extrema, state.tally.data(), state.counts.data(), words.data());
      EXPECT_NE(words[view_words(layout, needs) - 1], kGuard);
      EXPECT_EQ(std::count(words.end() - 64, words.end(), kGuard), 64);
    }
  }
}

}  // namespace
