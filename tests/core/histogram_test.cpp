#include "core/histogram.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "statistic_plain.h"

namespace {

using namespace torch_ext::core;
using statistic_plain::between;
using statistic_plain::counts_values;
using statistic_plain::kInfinity;
using statistic_plain::kKinds;
using statistic_plain::kLayouts;
using statistic_plain::Memory;
using statistic_plain::pick;
using statistic_plain::Random;
using statistic_plain::sample;
using statistic_plain::Values;

// The statistic of these values, through the brute force.
Memory memory_of(const Values& values, HistogramLayout layout) {
  Memory memory(1, layout);
  const statistic_plain::State state = statistic_plain::observe(values, layout);
  const ChannelStatistic raw = memory.channel(0);
  raw.extrema[0] = state.min;
  raw.extrema[1] = state.max;
  std::copy(state.tally.begin(), state.tally.end(), raw.tally);
  std::copy(state.counts.begin(), state.counts.end(), raw.counts);
  return memory;
}

void merge(Memory& into, const Memory& from) {
  merge_channel(into.channel(0), into.layout(), from.extrema(0), from.tally(0), from.counts(0));
}

Values joined(Values a, const Values& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TEST(Layout, OctavesLiveAtTheirExponentModuloTheWindow) {
  const HistogramLayout layout{7, 12};
  EXPECT_EQ(layout.bins(), 12 * 128);
  EXPECT_EQ(layout.size(), 2 * 12 * 128);
  EXPECT_EQ(layout.slot(127), 0);   // [1, 2)
  EXPECT_EQ(layout.slot(130), 3);   // [8, 16)
  EXPECT_EQ(layout.slot(139), 0);   // 2^12
  EXPECT_EQ(layout.slot(126), 11);  // [1/2, 1)
  EXPECT_EQ(layout.slot(115), 0);   // 2^-12
  EXPECT_EQ(layout.slot(114), 11);  // 2^-13
  EXPECT_EQ(layout.slot(1), 6);     // 2^-126 = 2^(-11 * 12 + 6)
  EXPECT_EQ(layout.octave_begin(126), 11 * 128);
}

TEST(Layout, OctavesOfAWindowHaveSlotsOfTheirOwn) {
  for (const int octaves : {4, 5, 12, 16, 31, 32}) {
    const HistogramLayout layout{5, octaves};
    for (int top = 1; top <= 254; ++top) {
      const int bottom = layout.bottom(top);
      EXPECT_EQ(bottom, std::max(1, top - octaves + 1));
      std::set<int> slots;
      for (int octave = bottom; octave <= top; ++octave) {
        const int exponent = octave - 127;
        const int residue =
            exponent -
            octaves * static_cast<int>(std::floor(static_cast<double>(exponent) / octaves));
        ASSERT_EQ(layout.slot(octave), residue) << "octave " << octave << " of " << octaves;
        slots.insert(layout.slot(octave));
      }
      ASSERT_EQ(static_cast<int>(slots.size()), top - bottom + 1);
    }
  }
}

TEST(Keys, OrderAsTheFloatsDo) {
  Random random(1);
  for (int i = 0; i < 200000; ++i) {
    const Values pair = sample(statistic_plain::Kind::any_bits, 2, random);
    if (std::isnan(pair[0]) || std::isnan(pair[1])) continue;
    EXPECT_EQ(bits_of(float_of_key(key_of(pair[0]))), bits_of(pair[0]));
    if (pair[0] == pair[1]) continue;
    ASSERT_EQ(key_of(pair[0]) < key_of(pair[1]), pair[0] < pair[1]) << pair[0] << " " << pair[1];
  }
}

TEST(Keys, FiniteOnesHaveSharpBounds) {
  const float largest = std::numeric_limits<float>::max();
  EXPECT_EQ(key_of(largest), kMaxFiniteKey);
  EXPECT_EQ(key_of(-largest), kMinFiniteKey);
  EXPECT_GT(key_of(kInfinity), kMaxFiniteKey);
  EXPECT_LT(key_of(-kInfinity), kMinFiniteKey);
  EXPECT_GT(key_of(float_of(0x7fc00000u)), kMaxFiniteKey);
  EXPECT_LT(key_of(float_of(0xffc00000u)), kMinFiniteKey);
  EXPECT_LT(key_of(-0.0f), key_of(0.0f));
}

TEST(Window, EndsAtTheOctaveOfTheLargestMagnitude) {
  EXPECT_EQ(top_octave(kInfinity, -kInfinity), 0);
  EXPECT_EQ(top_octave(0, 0), 0);
  EXPECT_EQ(top_octave(0, 0x1.fffffcp-127f), 0);  // subnormal
  EXPECT_EQ(top_octave(0, 0x1p-126f), 1);
  EXPECT_EQ(top_octave(-3, 1), 128);
  EXPECT_EQ(top_octave(-3, 5), 129);
  EXPECT_EQ(top_octave(-0x1.fffffep127f, 5), 254);
}

TEST(Window, RaisingItClearsWhatFallsOut) {
  const HistogramLayout layout{5, 4};
  Memory memory(1, layout);
  const ChannelStatistic raw = memory.channel(0);
  // Octaves 124..127 hold 1, 2, 3, 4 values in each bin of each sign.
  const auto fill = [&] {
    for (int octave = 124; octave <= 127; ++octave)
      for (int sign = 0; sign < 2; ++sign)
        std::fill_n(raw.counts + sign * 128 + layout.octave_begin(octave), 32, octave - 123);
  };
  fill();
  EXPECT_EQ(raise_window(raw.counts, layout, 127, 127), 0);
  EXPECT_EQ(raise_window(raw.counts, layout, 127, 126), 0);
  EXPECT_EQ(raise_window(raw.counts, layout, 127, 129), 64 * (1 + 2));
  EXPECT_EQ(raw.counts[layout.octave_begin(128)], 0);  // in the slot of 124
  EXPECT_EQ(raw.counts[layout.octave_begin(129)], 0);
  EXPECT_EQ(raw.counts[layout.octave_begin(126)], 3);
  EXPECT_EQ(raw.counts[128 + layout.octave_begin(127)], 4);
  fill();
  EXPECT_EQ(raise_window(raw.counts, layout, 127, 254), 64 * (1 + 2 + 3 + 4));
  EXPECT_EQ(std::count(raw.counts, raw.counts + layout.size(), 0), layout.size());
  fill();
  EXPECT_EQ(raise_window(raw.counts, layout, 0, 127), 0);  // nothing was in a window yet
}

TEST(Merge, IsTheStatisticOfBoth) {
  Random random(2);
  for (int trial = 0; trial < 1500; ++trial) {
    const HistogramLayout layout = pick(kLayouts, random);
    const auto draw = [&] {
      Values values = sample(pick(kKinds, random), between(0, 40, random), random);
      const int shift = static_cast<int>(between(-40, 40, random));
      for (float& x : values) x = std::ldexp(x, shift);
      return values;
    };
    const Values a = draw(), b = draw();
    Memory merged = memory_of(a, layout);
    merge(merged, memory_of(b, layout));
    ASSERT_TRUE(counts_values(merged, 0, joined(a, b))) << "trial " << trial;
    Memory other = memory_of(b, layout);
    merge(other, memory_of(a, layout));
    ASSERT_TRUE(merged == other) << "trial " << trial;
  }
}

TEST(Merge, WithAnEmptyStateChangesNothing) {
  Random random(3);
  for (const auto kind : kKinds) {
    for (const HistogramLayout layout : kLayouts) {
      const Values values = sample(kind, 50, random);
      const Memory state = memory_of(values, layout), empty(1, layout);
      Memory left = state, right = empty;
      merge(left, empty);
      merge(right, state);
      EXPECT_TRUE(left == state);
      EXPECT_TRUE(right == state);
    }
  }
}

// Each merge with itself doubles: sums go past 2^31, 2^33 and 2^53 without a rounding.
TEST(Merge, CountsPast2To53) {
  const HistogramLayout layout{7, 12};
  Memory state = memory_of({1, 1, -3, 0, 1e-20f, kInfinity, std::nanf("")}, layout);
  for (int i = 0; i < 55; ++i) {
    const Memory copy = state;
    merge(state, copy);
  }
  merge(state, memory_of({1, 0}, layout));
  const int64_t n = int64_t{1} << 55;
  const int64_t want[] = {5 * n + 2, n + 1, n, n, n};
  EXPECT_TRUE(std::equal(want, want + 5, state.tally(0)))
      << statistic_plain::text(state.tally(0), 5);
  EXPECT_EQ(state.counts(0)[statistic_plain::bin_of(1, layout)], 2 * n + 1);
  EXPECT_EQ(state.counts(0)[statistic_plain::bin_of(-3, layout)], n);
}

}  // namespace
