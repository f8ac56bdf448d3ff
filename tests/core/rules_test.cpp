#include <gtest/gtest.h>

#include <set>

#include "solving.h"

// Properties of every rule of the registry. A new rule is tested once its line is there.
namespace {

using namespace torch_ext;
using namespace solving;
using statistic_plain::Kind;
using statistic_plain::kInfinity;
using statistic_plain::kKinds;
using statistic_plain::kSearchable;
using statistic_plain::pick;
using statistic_plain::Random;
using statistic_plain::sample;

template <class L>
struct AsTypes;
template <class... R>
struct AsTypes<List<R...>> {
  using Types = testing::Types<R...>;
};
struct ByName {
  template <class R>
  static std::string GetName(int) {
    return R::name;
  }
};

template <class R>
class Rules : public testing::Test {
 protected:
  void TearDown() override { cpu::test_threads() = 2; }
  static constexpr bool observes = R::needs != core::Needs::nothing;
};
TYPED_TEST_SUITE(Rules, AsTypes<Observers>::Types, ByName);

// Grids that the rule is defined for.
template <class R>
std::vector<Grid> grids() {
  std::vector<Grid> all(std::begin(kGrids), std::end(kGrids));
  if (R::max_bits >= 16) {
    all.push_back({{-32768, 32767}, true, ScaleRule::grid, false});
    all.push_back({{0, 65535}, false, ScaleRule::grid, false});
  }
  return all;
}

// The options that are in the unit of the data, converted to another unit.
template <class R>
std::vector<double> defaults_in_unit(double unit) {
  std::vector<double> values = defaults<R>();
  for (int32_t i = 0; i < R::option_count; ++i)
    for (const char* name : {"xmin", "xmax", "scale"})
      if (std::string(R::options[i].name) == name) values[i] *= unit;
  return values;
}

TYPED_TEST(Rules, HasANameOfItsOwn) {
  const std::string name = TypeParam::name;
  EXPECT_EQ(name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_"), std::string::npos);
  EXPECT_FALSE(name.empty());
  int same = 0;
  Observers::for_each([&]<class R>(int32_t) { same += name == R::name ? 1 : 0; });
  EXPECT_EQ(same, 1);
}

TYPED_TEST(Rules, HasValidOptions) {
  EXPECT_GE(TypeParam::max_bits, 2);
  EXPECT_LE(TypeParam::max_bits, 16);
  std::set<std::string> names;
  for (int32_t i = 0; i < TypeParam::option_count; ++i) {
    const core::Option& option = TypeParam::options[i];
    EXPECT_TRUE(names.insert(option.name).second) << option.name;
    EXPECT_LE(option.minimum, option.value) << option.name;
    EXPECT_LE(option.value, option.maximum) << option.name;
    if (option.choices == nullptr) continue;
    EXPECT_EQ(option.minimum, 0) << option.name;
    EXPECT_EQ(option.maximum, option.choice_count - 1) << option.name;
    EXPECT_EQ(option.value, std::floor(option.value)) << option.name;
    std::set<std::string> choices(option.choices, option.choices + option.choice_count);
    EXPECT_EQ(static_cast<int32_t>(choices.size()), option.choice_count) << option.name;
  }
  if constexpr (core::ChecksOptions<TypeParam>) {
    const auto options = defaults<TypeParam>();
    for (const Grid& grid : grids<TypeParam>())
      for (const HistogramLayout layout : {core::kPerTensor, core::kPerChannel})
        EXPECT_EQ(TypeParam::complaint(grid, layout, options.data()).want, nullptr);
  }
}

TYPED_TEST(Rules, GivesAFiniteRangeInOrderAndItsQParams) {
  Random random(61);
  for (const Kind kind : kKinds) {
    for (const int n : {1, 2, 50, 3000}) {
      const Values values = sample(kind, n, random);
      Memory memory = observed(values);
      if (memory.tally(0)[core::kFinite] == 0) continue;
      const double least = std::min(memory.extrema(0)[0], 0.0f);
      const double upper = std::max(memory.extrema(0)[1], 0.0f);
      for (const Grid& grid : grids<TypeParam>()) {
        SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)) + ", " + std::to_string(n));
        const Solved solved = solve<TypeParam>(memory, grid);
        const double lo = solved.range[0], hi = solved.range[1];
        ASSERT_TRUE(std::isfinite(lo) && std::isfinite(hi) && lo <= hi) << lo << " to " << hi;
        // The first scale of learned step sizes is a multiple of the mean, and no bound.
        if (this->observes && !std::is_same_v<TypeParam, observers::MeanAbs>) {
          ASSERT_TRUE(lo >= least && hi <= upper) << lo << " to " << hi;
        }
        ASSERT_TRUE(solved.scale[0] >= 0x1p-126f && std::isfinite(solved.scale[0]));
        if constexpr (!core::GivesQParams<TypeParam>) {
          const core::QParams q = core::qparams({lo, hi}, grid);
          ASSERT_EQ(solved.scale[0], q.scale);
          ASSERT_EQ(solved.zero_point[0], q.zero_point);
        }
      }
    }
  }
}

TYPED_TEST(Rules, ScalesWithTheDataByPowersOfTwo) {
  Random random(62);
  for (const Kind kind : kSearchable) {
    const Values values = sample(kind, 700, random);
    for (const HistogramLayout layout : {core::kPerTensor, core::kPerChannel}) {
      Memory memory = observed(values, layout);
      for (const int j : {-30, -3, 1, 5, 40}) {
        Values scaled = values;
        for (float& x : scaled) x = std::ldexp(x, j);
        Memory other = observed(scaled, layout);
        const auto options = defaults_in_unit<TypeParam>(std::ldexp(1.0, j));
        for (const Grid& grid : {kInt8, kInt4, kUint8, kUint8Affine}) {
          const Solved want = solve<TypeParam>(memory, grid);
          const Solved have = solve<TypeParam>(other, grid, options);
          for (int end = 0; end < 2; ++end)
            ASSERT_EQ(have.range[end], std::ldexp(want.range[end], j))
                << "kind " << static_cast<int>(kind) << " by 2^" << j;
        }
      }
    }
  }
}

// A rule that reads no values gives the same range as ever.
TYPED_TEST(Rules, GivesZeroWhereNothingWasSeen) {
  Memory empty(1, core::kPerTensor), nothing_finite(1, core::kPerTensor);
  observe({kInfinity, -kInfinity, std::nanf("")}, nothing_finite);
  Memory data = observed({-1, 2});
  const Solved zero{{0, 0}, {1}, {0}};
  const Solved want = this->observes ? zero : solve<TypeParam>(data, kInt8);
  EXPECT_TRUE(solve<TypeParam>(empty, kInt8) == want);
  EXPECT_TRUE(solve<TypeParam>(nothing_finite, kInt8) == want);
}

TYPED_TEST(Rules, GivesZeroForZeros) {
  Memory zeros = observed(Values(100, -0.0f)), data = observed({-1, 2});
  const Solved zero{{0, 0}, {1}, {0}};
  const Solved want = this->observes ? zero : solve<TypeParam>(data, kInt8Affine);
  EXPECT_TRUE(solve<TypeParam>(zeros, kInt8Affine) == want);
}

TYPED_TEST(Rules, SolvesMergedHalvesAsTheWhole) {
  Random random(63);
  for (const Kind kind : kSearchable) {
    const Values values = sample(kind, 3001, random);
    Memory whole = observed(values);
    Memory first = observed({values.begin(), values.begin() + 1200});
    Memory second = observed({values.begin() + 1200, values.end()});
    cpu::merge(second.raw(), first.raw());
    for (const Grid& grid : grids<TypeParam>())
      EXPECT_TRUE(solve<TypeParam>(second, grid) == solve<TypeParam>(whole, grid));
  }
}

TYPED_TEST(Rules, SolvesChannelsAsIfAlone) {
  Random random(64);
  constexpr int64_t kChannels = 13;
  Memory all(kChannels, core::kPerChannel);
  std::vector<Solved> alone;
  for (int64_t c = 0; c < kChannels; ++c) {
    // Channel 5 stays empty.
    const Values values = sample(pick(kSearchable, random), c == 5 ? 0 : 400, random);
    Memory single = observed(values, core::kPerChannel);
    core::merge_channel(all.channel(c), core::kPerChannel, single.extrema(0), single.tally(0),
                        single.counts(0));
    alone.push_back(solve<TypeParam>(single, kUint8Affine));
  }
  for (const int64_t threads : {1, 2, 8}) {
    cpu::test_threads() = threads;
    const Solved solved = solve<TypeParam>(all, kUint8Affine);
    for (int64_t c = 0; c < kChannels; ++c) {
      EXPECT_EQ(solved.range[2 * c], alone[c].range[0]) << c;
      EXPECT_EQ(solved.range[2 * c + 1], alone[c].range[1]) << c;
      EXPECT_EQ(solved.scale[c], alone[c].scale[0]) << c;
      EXPECT_EQ(solved.zero_point[c], alone[c].zero_point[0]) << c;
    }
  }
}

// Closed rules; search_test.cpp does the same for search rules.
TYPED_TEST(Rules, GivesTheSameWithEveryInstructionSet) {
  if constexpr (!core::SearchRule<TypeParam> && TypeParam::needs != core::Needs::nothing) {
    Random random(65);
    const auto options = defaults<TypeParam>();
    std::vector<int64_t> words(1 << 16);
    for (const Kind kind : kKinds) {
      const view_plain::Built built(sample(kind, 900, random), core::kPerTensor,
                                    core::Needs::moments);
      if (built.view.finite == 0) continue;
      for (const Grid& grid : {kInt8, kUint4Affine}) {
        const auto range_by = [&](const cpu::Kernels& set) {
          return set.solve.closed(index_of<TypeParam>(), built.view, grid, options.data(),
                                  words.data());
        };
        const core::Range want = range_by(cpu::base::table);
        for (const cpu::Kernels* const* set = cpu::runnable_kernels(); *set != nullptr; ++set) {
          EXPECT_EQ(range_by(**set).lo, want.lo) << (*set)->name;
          EXPECT_EQ(range_by(**set).hi, want.hi) << (*set)->name;
        }
      }
    }
  }
}

}  // namespace
