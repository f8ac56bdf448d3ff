#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/driver.h"
#include "machines.h"
#include "mutations.h"
#include "rule_table.h"
#include "solving.h"
#include "statistic_plain.h"

// The kernels of solve.cu, run on the host, against the CPU's, which tests/core compares with brute
// force.
namespace {

using namespace torch_ext;
using core::Grid;
using core::HistogramLayout;
using core::Needs;
using core::SolveJob;
using statistic_plain::between;
using statistic_plain::kKinds;
using statistic_plain::Memory;
using statistic_plain::pick;
using statistic_plain::Random;
using statistic_plain::Values;

// One quantizer's memory; `start` is its content before it is solved.
struct Quantizer {
  int32_t rule;
  Grid grid;
  std::vector<double> options;
  Memory statistic;
  std::vector<float> range, scale;
  std::vector<int32_t> zero_point;
  uint8_t solved;
  bool follows;
  double averaging_constant;

  SolveJob job() {
    return {rule,
            grid,
            options.data(),
            statistic.raw(),
            range.data(),
            scale.data(),
            zero_point.data(),
            follows ? &solved : nullptr,
            averaging_constant};
  }
  friend bool operator==(const Quantizer& a, const Quantizer& b) {
    const auto bits = [](const std::vector<float>& x, const std::vector<float>& y) {
      return std::memcmp(x.data(), y.data(), 4 * x.size()) == 0;
    };
    return bits(a.range, b.range) && bits(a.scale, b.scale) && a.zero_point == b.zero_point &&
           a.solved == b.solved;
  }
};

void solve_on_device(std::vector<Quantizer>& quantizers) {
  std::vector<SolveJob> jobs;
  for (Quantizer& q : quantizers) jobs.push_back(q.job());
  const int64_t count = static_cast<int64_t>(jobs.size());
  machines::Scratch scratch(cuda::solve_scratch(jobs.data(), count));
  cuda::solve(jobs.data(), count, scratch.data(), nullptr);
}
void solve_on_cpu(std::vector<Quantizer>& quantizers) {
  std::vector<SolveJob> jobs;
  for (Quantizer& q : quantizers) jobs.push_back(q.job());
  cpu::solve(jobs.data(), static_cast<int64_t>(jobs.size()));
}

std::string text(const Quantizer& q) {
  return std::string(rules()[q.rule].name) + " [" + std::to_string(q.grid.quant_min) + ", " +
         std::to_string(q.grid.quant_max) + "] range " + std::to_string(q.range[0]) + ", " +
         std::to_string(q.range[1]) + " scale " + std::to_string(q.scale[0]) + " solved " +
         std::to_string(q.solved);
}

void expect_parity(std::vector<Quantizer> quantizers) {
  std::vector<Quantizer> want = quantizers;
  solve_on_device(quantizers);
  solve_on_cpu(want);
  for (size_t i = 0; i < want.size(); ++i)
    ASSERT_TRUE(quantizers[i] == want[i])
        << i << ": " << text(quantizers[i]) << ", want " << text(want[i]);
}

// Data that the rule's options and grid are defined for.
Quantizer make(int32_t rule, const Grid& grid, HistogramLayout layout, int64_t channels,
               int64_t values, Random& random) {
  const RuleRow& row = rules()[rule];
  std::vector<double> options;
  for (const core::Option& option : row.options) options.push_back(option.value);
  Quantizer q{rule,
              grid,
              options,
              Memory(channels, layout),
              std::vector<float>(2 * channels, 0.25f),
              std::vector<float>(channels, 7.0f),
              std::vector<int32_t>(channels, 3),
              0,
              false,
              1};
  for (int64_t c = 0; c < channels; ++c) {
    // Some channels have no range yet, which matters with averaging_constant 0.
    if (random() % 2 == 0) q.range[2 * c] = q.range[2 * c + 1] = 0;
    // Some channels have no values, or nothing but zeros.
    const int64_t n = random() % 6 == 0 ? 0 : values;
    Values x = statistic_plain::sample(pick(kKinds, random), n, random);
    if (random() % 6 == 0) std::fill(x.begin(), x.end(), 0.0f);
    const int64_t stride = 1;
    const core::ChannelStatistic channel = q.statistic.channel(c);
    cpu::observe({x.data(), core::DType::f32, 1, &n, &stride}, -1,
                 {channel.extrema, channel.tally, channel.counts, 1, layout});
  }
  return q;
}

const HistogramLayout kLayouts[] = {{10, 16}, {7, 12}, {5, 4}, {6, 32}};

void use_some_machine(Random& random) {
  gpu::emulation::machine() = pick(machines::kMachines, random);
  gpu::emulation::machine().seed = random();
}

TEST(Solve, EveryRuleOnEveryGrid) {
  Random random(41);
  for (size_t rule = 0; rule < rules().size(); ++rule) {
    const bool is_search = rules()[rule].search_words != nullptr || rules()[rule].composite;
    for (const Grid& grid : solving::kGrids) {
      // Brute force is slow, so each rule is tested with some of the pairs.
      if (is_search && random() % 3 != 0) continue;
      use_some_machine(random);
      std::vector<Quantizer> quantizers;
      quantizers.push_back(make(rule, grid, pick(kLayouts, random), between(1, 3, random),
                                is_search ? 400 : 3000, random));
      expect_parity(quantizers);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Solve, EveryRuleThatTakesThemOnFloats) {
  Random random(44);
  for (size_t rule = 0; rule < rules().size(); ++rule) {
    if (rules()[rule].only_integers != nullptr) continue;
    const bool is_search = rules()[rule].search_words != nullptr || rules()[rule].composite;
    for (const Grid& grid : solving::kFloatGrids) {
      use_some_machine(random);
      std::vector<Quantizer> quantizers;
      quantizers.push_back(make(rule, grid, is_search ? HistogramLayout{6, 8} : kLayouts[0],
                                between(1, 3, random), is_search ? 400 : 3000, random));
      expect_parity(quantizers);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Solve, KlVariants) {
  Random random(42);
  const int32_t kl = solving::index_of<observers::Kl>();
  for (int variant = 0; variant < 5; ++variant) {
    use_some_machine(random);
    std::vector<Quantizer> quantizers;
    quantizers.push_back(make(kl, solving::kInt4, {variant == 0 ? 10 : 7, 12}, 2, 2000, random));
    quantizers.back().options = {static_cast<double>(variant)};
    expect_parity(quantizers);
    if (HasFatalFailure()) return;
  }
}

// Quantizers of all kinds in one list, cheap ones between the others.
TEST(Solve, ListsOfMixedRules) {
  Random random(43);
  for (int trial = 0; trial < 6; ++trial) {
    use_some_machine(random);
    std::vector<Quantizer> quantizers;
    for (int i = 0; i < 12; ++i) {
      const int32_t rule = static_cast<int32_t>(random() % rules().size());
      const bool is_search = rules()[rule].search_words != nullptr || rules()[rule].composite;
      const Grid grid =
          rules()[rule].max_bits < 16 ? solving::kInt4 : pick(solving::kGrids, random);
      quantizers.push_back(make(rule, grid,
                                is_search ? HistogramLayout{6, 8} : pick(kLayouts, random),
                                between(1, 4, random), 500, random));
    }
    expect_parity(quantizers);
    if (HasFatalFailure()) return;
  }
}

TEST(Solve, MoreJobsThanALaunchTakes) {
  Random random(44);
  gpu::emulation::machine() = machines::kMachines[0];
  std::vector<Quantizer> quantizers;
  for (int i = 0; i < 300; ++i)
    quantizers.push_back(make(solving::index_of<observers::MinMax>(), solving::kInt8, {0, 0},
                              between(1, 9, random), 20, random));
  const int64_t before = gpu::emulation::launches();
  expect_parity(quantizers);
  EXPECT_EQ(gpu::emulation::launches(), before + 3);
}

// Ranges that follow: first batch, averaging, averaging constant 1, frozen; channels without
// values. A flag that is set, to 2 for a range that is held, stays.
TEST(Solve, RangesFollow) {
  Random random(45);
  for (const char* name : {"min_max", "percentile", "mse", "fixed_scale"}) {
    int32_t rule = 0;
    while (std::string(rules()[rule].name) != name) ++rule;
    for (const uint8_t solved : {0, 1, 2}) {
      for (const double constant : {0.0, 0.01, 1.0}) {
        use_some_machine(random);
        std::vector<Quantizer> quantizers;
        const HistogramLayout layout =
            rules()[rule].needs < Needs::counts ? HistogramLayout{0, 0} : HistogramLayout{6, 8};
        quantizers.push_back(make(rule, solving::kInt8, layout, 5, 200, random));
        quantizers.push_back(make(rule, solving::kInt8, layout, 1, 0, random));
        for (Quantizer& q : quantizers) {
          q.follows = true;
          q.solved = solved;
          q.averaging_constant = constant;
        }
        // The CPU's op stops before a frozen range is solved.
        if (constant == 0 && solved != 0) {
          const std::vector<Quantizer> before = quantizers;
          solve_on_device(quantizers);
          for (size_t i = 0; i < before.size(); ++i) ASSERT_TRUE(quantizers[i] == before[i]);
        } else {
          expect_parity(quantizers);
          if (HasFatalFailure()) return;
          solve_on_device(quantizers);
          for (const Quantizer& q : quantizers) {
            if (solved != 0) {
              ASSERT_EQ(q.solved, solved) << name;
            }
          }
        }
      }
    }
  }
}

// As many values as a tally holds, whose sums of squares take more than 64 bits.
TEST(Solve, HugeCounts) {
  Random random(48);
  for (size_t rule = 0; rule < rules().size(); ++rule) {
    if (rules()[rule].needs < Needs::counts) continue;
    use_some_machine(random);
    std::vector<Quantizer> quantizers;
    const HistogramLayout layout = pick({HistogramLayout{6, 8}, HistogramLayout{5, 4}}, random);
    quantizers.push_back(make(static_cast<int32_t>(rule), solving::kInt4, layout, 2, 500, random));
    for (int64_t c = 0; c < 2; ++c) {
      const core::ChannelStatistic s = quantizers[0].statistic.channel(c);
      const int64_t copies = c == 0 ? 18'000'000'000'000'001 : (int64_t{1} << 31) + 5;
      for (int column = 0; column < core::kTallyColumns; ++column) s.tally[column] *= copies;
      for (int64_t i = 0; i < layout.size(); ++i) s.counts[i] *= copies;
    }
    expect_parity(quantizers);
    if (HasFatalFailure()) return;
  }
}

// A statistic that contradicts itself, for which the CPU raises, gives NaN.
TEST(Solve, WrongStatisticsGiveNan) {
  Random random(46);
  gpu::emulation::machine() = machines::kMachines[0];
  for (const char* name : {"min_max", "percentile", "kl", "mix"}) {
    int32_t rule = 0;
    while (std::string(rules()[rule].name) != name) ++rule;
    for (int wrong = 0; wrong < 9; ++wrong) {
      std::vector<Quantizer> quantizers;
      quantizers.push_back(make(rule, solving::kInt8, {6, 8}, 1, 300, random));
      solving::observe({1.0f, 2.0f}, quantizers[0].statistic);
      const core::ChannelStatistic s = quantizers[0].statistic.channel(0);
      if (wrong == 0) std::swap(s.extrema[0], s.extrema[1]);
      if (wrong == 1) s.extrema[1] = INFINITY;
      if (wrong == 2) s.extrema[0] = NAN;
      if (wrong == 3) s.tally[core::kFinite] += 1;
      if (wrong == 8) s.tally[core::kFinite] = -2;  // it has wrapped
      if (wrong >= 3 && wrong != 8 && rules()[rule].needs < Needs::counts) continue;
      if (wrong > 3 && wrong != 8) {
        // Counts that would overflow: too many, some that cancel, one that is negative.
        int64_t* const filled =
            std::find_if(s.counts, s.counts + 8 * 64 * 2, [](int64_t n) { return n > 0; });
        if (wrong == 4) s.tally[core::kFinite] = INT64_MAX;
        if (wrong == 5) filled[0] += INT64_MAX - 1000, filled[1] -= INT64_MAX - 1000;
        if (wrong == 6) filled[0] = -filled[0];
        // Three that wrap to the right sum, modulo 2^64.
        if (wrong == 7) filled[2] += filled[0] + filled[1] + 2, filled[0] = filled[1] = INT64_MAX;
      }
      if (wrong == 0 && s.extrema[0] == s.extrema[1]) continue;
      solve_on_device(quantizers);
      EXPECT_TRUE(std::isnan(quantizers[0].range[0])) << name << " " << wrong;
      EXPECT_TRUE(std::isnan(quantizers[0].range[1])) << name << " " << wrong;
      EXPECT_TRUE(std::isnan(quantizers[0].scale[0])) << name << " " << wrong;
    }
  }
}

// Lists that take every step: rules of every kind, and rules that read extrema alone; ranges that
// follow. Three barriers of composite rules are spare: one before a search is prepared, one after
// its objectives, which a thread reads where it wrote them, and the one at a row's end. Those of
// the reduction between them hold all threads back as well.
TEST(Solve, BarriersAreNeeded) {
  Random random(49);
  gpu::emulation::machine() = machines::kMachines[0];
  std::vector<Quantizer> every, extrema;
  for (size_t rule = 0; rule < rules().size(); ++rule) {
    Quantizer q = make(static_cast<int32_t>(rule), solving::kInt4, {6, 8}, 2, 300, random);
    q.follows = true;
    q.averaging_constant = 0.25;
    every.push_back(q);
  }
  for (int channels : {1200, 3}) {
    extrema.push_back(
        make(solving::index_of<observers::MinMax>(), solving::kInt4, {6, 8}, channels, 4, random));
    extrema.back().follows = true;
    extrema.back().averaging_constant = 0.25;
  }
  const auto expect = [](size_t spare, const std::vector<Quantizer>& quantizers) {
    std::vector<Quantizer> want = quantizers;
    solve_on_cpu(want);
    mutations::expect_barriers_are_needed(spare, [&] {
      std::vector<Quantizer> have = quantizers;
      solve_on_device(have);
      return have == want;
    });
  };
  expect(3, every);
  expect(0, extrema);
}

// More rows than there is memory for at a time are solved in waves.
TEST(Solve, ManyChannels) {
  Random random(47);
  gpu::emulation::machine() = machines::kMachines[2];
  std::vector<Quantizer> quantizers;
  quantizers.push_back(
      make(solving::index_of<observers::Percentile>(), solving::kInt8, {5, 4}, 90, 50, random));
  expect_parity(quantizers);
}

TEST(QParams, AreTheCpus) {
  gpu::emulation::machine() = machines::kMachines[0];
  const std::vector<float> range = {-1,   2,    0,        0,   -3e38f, 3e38f,
                                    -5.f, -2.f, INFINITY, 1.f, 3.f,    2.f};
  for (const Grid& grid : solving::kGrids) {
    std::vector<float> scale(6);
    std::vector<int32_t> zero_point(6);
    cuda::qparams(range.data(), 6, grid, nullptr, scale.data(), zero_point.data(), nullptr);
    for (int c = 0; c < 6; ++c) {
      const core::QParams want = core::qparams({range[2 * c], range[2 * c + 1]}, grid);
      EXPECT_EQ(zero_point[c], want.zero_point);
      if (c < 4)
        EXPECT_EQ(scale[c], want.scale);
      else
        EXPECT_TRUE(std::isnan(scale[c]));
    }
  }
}

}  // namespace
