#include <gtest/gtest.h>

#include <functional>
#include <span>

#include "search_plain.h"
#include "solving.h"

// The searches of kl and mse against every candidate evaluated in long double.
namespace {

using namespace torch_ext;
using namespace solving;
using search_plain::Real;
using statistic_plain::between;
using statistic_plain::Kind;
using statistic_plain::kLayouts;
using statistic_plain::kSearchable;
using statistic_plain::pick;
using statistic_plain::Random;
using statistic_plain::sample;
using view_plain::Atoms;
using view_plain::Built;

using Objective = std::function<Real(const Atoms&, const Grid&, Real)>;

// The rounding error that double may add to an objective, beside the tie bound.
constexpr Real kRelative = 2e-12L, kAbsolute = 2e-14L;

// Whether a threshold is the smallest that ties with the least objective. Those whose objective
// lies on the border of a tie, as far as double can tell, may be either.
testing::AssertionResult is_least(Real have, const std::vector<Real>& t,
                                  const std::vector<Real>& objective, Real largest) {
  Real least = search_plain::kInfinity;
  for (const Real value : objective) least = std::min(least, value);
  if (least == search_plain::kInfinity) {
    if (have == largest) return testing::AssertionSuccess();
    return testing::AssertionFailure() << have << " without a candidate, want " << largest;
  }
  const Real bound = least + 1e-12L * std::fabs(least) + 1e-14L;
  const Real slack = kRelative * std::fabs(least) + kAbsolute;
  for (size_t i = 0; i < t.size(); ++i) {
    const Real threshold = std::min(t[i], largest);
    if (threshold == have && objective[i] <= bound + slack) return testing::AssertionSuccess();
    if (objective[i] <= bound - slack)
      return testing::AssertionFailure() << have << ", want " << threshold;
  }
  return testing::AssertionFailure() << have << " is no candidate that ties";
}

// Random statistics: kinds of data, sizes and layouts; and the grids of `draw`.
template <class R, class Draw>
void expect_least(int trials, uint64_t seed, int64_t max_values, const Objective& plain,
                  const Draw& draw) {
  Random random(seed);
  int without = 0;
  for (int trial = 0; trial < trials; ++trial) {
    const Kind kind = kSearchable[trial % std::size(kSearchable)];
    const Grid grid = draw(trial, random);
    const int64_t n = pick({int64_t{3}, int64_t{40}, int64_t{700}, max_values}, random);
    const HistogramLayout layout = pick(kLayouts, random);
    SCOPED_TRACE("trial " + std::to_string(trial) + ", kind " +
                 std::to_string(static_cast<int>(kind)) + ", n " + std::to_string(n) + ", grid " +
                 std::to_string(grid.quant_min) + ".." + std::to_string(grid.quant_max));
    const Built built(sample(kind, n, random), layout, R::needs);
    const std::vector<Real> t = search_plain::candidates(built.atoms, layout.octaves);
    std::vector<Real> want;
    for (const Real candidate : t) want.push_back(plain(built.atoms, grid, candidate));
    const Searched have = search<R>(cpu::kernels().solve, built.view, grid);
    ASSERT_EQ(have.objectives.size(), t.size());
    for (size_t i = 0; i < t.size(); ++i) {
      if (want[i] == search_plain::kInfinity) {
        ASSERT_EQ(have.objectives[i], std::numeric_limits<double>::infinity()) << "T " << t[i];
      } else {
        ASSERT_LE(std::fabs(have.objectives[i] - want[i]),
                  kRelative * std::fabs(want[i]) + kAbsolute)
            << "T " << t[i] << ": have " << have.objectives[i] << ", want " << want[i];
      }
    }
    ASSERT_TRUE(is_least(have.threshold, t, want, built.atoms.largest()));
    without += t.empty() ? 1 : 0;
  }
  EXPECT_LT(without, trials / 3);  // most had something to search
}

// Of the costly 8-bit grids one in three.
Grid some_integers(int trial, Random& random) {
  return trial % 3 == 0 ? pick(kGrids, random)
                        : pick({kInt4, kInt2, kTernary, kUint4, kUint4Affine}, random);
}

TEST(SearchKl, ChoosesTheLeastOfAllCandidates) {
  expect_least<observers::Kl>(240, 51, 20000, search_plain::kl, some_integers);
}

TEST(SearchMse, ChoosesTheLeastOfAllCandidates) {
  expect_least<observers::Mse>(240, 52, 4000, search_plain::mse, some_integers);
}

TEST(SearchMse, ChoosesTheLeastOfAllCandidatesOnFloats) {
  expect_least<observers::Mse>(90, 57, 1000, search_plain::mse,
                               [](int, Random& random) { return pick(kFloatGrids, random); });
}

// Objectives have the same bits, which CPU and CUDA need to agree too.
template <class R>
void expect_same_everywhere(uint64_t seed, const std::vector<double>& options,
                            std::span<const Grid> grids = kGrids) {
  Random random(seed);
  for (int trial = 0; trial < 30; ++trial) {
    const Kind kind = kSearchable[trial % std::size(kSearchable)];
    const HistogramLayout layout = trial % 2 == 0 ? core::kPerTensor : core::kPerChannel;
    const Built built(sample(kind, between(2, 9000, random), random), layout, R::needs);
    const Grid grid = grids[random() % grids.size()];
    const Searched first = search<R>(cpu::base::table.solve, built.view, grid, options);
    for (const cpu::Kernels* const* set = cpu::runnable_kernels(); *set != nullptr; ++set) {
      const Searched other = search<R>((*set)->solve, built.view, grid, options);
      EXPECT_EQ(other.threshold, first.threshold) << (*set)->name << ", trial " << trial;
      ASSERT_TRUE(other.objectives == first.objectives) << (*set)->name << ", trial " << trial;
    }
  }
}

TEST(SearchKl, IsTheSameWithEveryInstructionSet) {
  for (double variant = 0; variant < observers::Kl::options[0].choice_count; ++variant)
    expect_same_everywhere<observers::Kl>(53, {variant});
}

TEST(SearchMse, IsTheSameWithEveryInstructionSet) {
  expect_same_everywhere<observers::Mse>(54, {});
  expect_same_everywhere<observers::Mse>(58, {}, kFloatGrids);
}

// Candidates that are given up could not have won: the others have their own objective, and the
// threshold is the same.
template <class R, class Draw>
void expect_only_losers_given_up(uint64_t seed, const Draw& draw) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  Random random(seed);
  int64_t given_up = 0;
  for (int trial = 0; trial < 300; ++trial) {
    const Kind kind = kSearchable[trial % std::size(kSearchable)];
    const HistogramLayout layout = pick(kLayouts, random);
    const Grid grid = draw(trial, random);
    // 9000 values and more are one wide view in six.
    const int64_t copies = trial % 6 == 0 ? int64_t{1} << 27 : 1;
    const Built built(sample(kind, between(2, 9000, random), random), layout, R::needs, copies);
    SCOPED_TRACE("trial " + std::to_string(trial));
    for (const cpu::Kernels* const* set = cpu::runnable_kernels(); *set != nullptr; ++set) {
      const Searched all = search<R>((*set)->solve, built.view, grid);
      const Searched some = search<R>((*set)->solve, built.view, grid, defaults<R>(), true);
      ASSERT_EQ(some.threshold, all.threshold) << (*set)->name;
      double least = kInfinity;
      for (const double objective : all.objectives) least = std::min(least, objective);
      for (size_t i = 0; i < all.objectives.size(); ++i) {
        if (some.objectives[i] == all.objectives[i]) continue;
        ++given_up;
        ASSERT_EQ(some.objectives[i], kInfinity) << i;
        ASSERT_GT(all.objectives[i], core::tie_bound(least)) << i;
      }
    }
  }
  EXPECT_GT(given_up, 10000);
}

Grid mostly_wide(int trial, Random& random) {
  return trial % 4 == 0 ? pick({kInt2, kTernary}, random) : pick(kGrids, random);
}

TEST(SearchKl, GivesUpOnlyLosers) { expect_only_losers_given_up<observers::Kl>(58, mostly_wide); }
TEST(SearchMse, GivesUpOnlyLosers) { expect_only_losers_given_up<observers::Mse>(59, mostly_wide); }
TEST(SearchMse, GivesUpOnlyLosersOnFloats) {
  expect_only_losers_given_up<observers::Mse>(
      61, [](int, Random& random) { return pick(kFloatGrids, random); });
}

// With one channel the threads share its candidates; with many each channel is solved by one
// thread.
template <class R>
void expect_same_for_any_threads(uint64_t seed, const std::vector<double>& options) {
  Random random(seed);
  for (const int64_t channels : {1, 3, 40}) {
    Memory memory(channels, core::kPerChannel);
    const Values x = sample(Kind::laplace, channels * 500, random);
    const int64_t sizes[] = {channels, 500}, strides[] = {500, 1};
    cpu::observe({x.data(), core::DType::f32, 2, sizes, strides}, 0, memory.raw());
    for (const Grid& grid : {kInt8, kUint4Affine}) {
      cpu::test_threads() = 1;
      const Solved serial = solve<R>(memory, grid, options);
      for (const int64_t threads : {2, 3, 8}) {
        cpu::test_threads() = threads;
        EXPECT_TRUE(solve<R>(memory, grid, options) == serial)
            << threads << " threads, " << channels << " channels";
      }
    }
  }
  cpu::test_threads() = 2;
}

TEST(SearchKl, IsTheSameForAnyThreads) {
  for (const double variant : {0, 1, 4}) expect_same_for_any_threads<observers::Kl>(55, {variant});
}
TEST(SearchMse, IsTheSameForAnyThreads) { expect_same_for_any_threads<observers::Mse>(56, {}); }

// Values per linear bin of |x| of width 2^(emax-m), from the values themselves.
std::vector<int64_t> linear_histogram(const Values& values, const Atoms& atoms, int mantissa_bits,
                                      bool with_zeros) {
  std::vector<int64_t> counts(int64_t{2} << mantissa_bits);
  const int unit = std::ilogb(atoms.largest()) - mantissa_bits;
  for (const float x : values) {
    if (x == 0 && !with_zeros) continue;
    ++counts[static_cast<int64_t>(std::ldexp(std::fabs(static_cast<double>(x)), -unit))];
  }
  return counts;
}

TEST(SearchKl, ReferenceVariantsSearchTheLinearHistogram) {
  struct Variant {
    double option;
    observers::KlVariant variant;
  };
  const Variant variants[] = {{1, observers::KlVariant::slides},
                              {2, observers::KlVariant::modelopt},
                              {3, observers::KlVariant::ncnn},
                              {4, observers::KlVariant::horizon}};
  Random random(57);
  for (int trial = 0; trial < 72; ++trial) {
    const Kind kind = kSearchable[trial % std::size(kSearchable)];
    const HistogramLayout layout = pick({core::kPerTensor, core::kPerChannel, {6, 7}}, random);
    const Values values = sample(kind, between(2, 6000, random), random);
    const Built built(values, layout, core::Needs::counts);
    const Grid grid = layout.mantissa_bits >= 7 ? pick(kGrids, random) : kUint4;
    Memory memory = observed(values, layout);
    const int levels = search_plain::kl_levels(built.atoms, grid);
    for (const Variant& v : variants) {
      const auto counts = linear_histogram(values, built.atoms, layout.mantissa_bits,
                                           v.variant != observers::KlVariant::ncnn);
      const double largest = static_cast<double>(built.atoms.largest());
      const double width = std::ldexp(1.0, std::ilogb(largest) - layout.mantissa_bits);
      int64_t index = 0;
      double want = 0;
      cpu::kl_threshold(counts.data(), &width, 1, static_cast<int64_t>(counts.size()), levels,
                        v.variant, &index, &want);
      want = std::min(want, largest);
      const Solved have = solve<observers::Kl>(memory, grid, {v.option});
      const auto clamped = [&](Real x) {
        return static_cast<float>(search_plain::clamp(x, -want, want));
      };
      ASSERT_EQ(have.range[0], clamped(built.atoms.min)) << trial << ", variant " << v.option;
      ASSERT_EQ(have.range[1], clamped(built.atoms.max)) << trial << ", variant " << v.option;
    }
  }
}

}  // namespace
