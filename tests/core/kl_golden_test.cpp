#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>

#include "kl_histograms.h"

namespace {

using kl_testing::golden;
using kl_testing::golden_signed;
using kl_testing::mirrored;
using kl_testing::solve;
using kl_testing::Solved;
using kl_testing::sums_of;
using kl_testing::variant;

TEST(KlGolden, SumsAreThoseOfTheDefinitions) {
  EXPECT_EQ(kl_plain::sum(golden('V'), 0, 2048), 62958968);
  EXPECT_EQ(golden('V')[0], 1000000);
  EXPECT_EQ(golden('V')[1000], 9);
  EXPECT_EQ(kl_plain::sum(golden('W'), 0, 2048), 96499299);
}

TEST(KlGolden, IndexOnMagnitudes) {
  const std::map<std::string, std::map<char, int64_t>> expected = {
      {"ncnn",
       {{'P', 2024},
        {'Q', 2047},
        {'R', 256},
        {'S', 1638},
        {'T', 128},
        {'U', 2047},
        {'V', 645},
        {'W', 954}}},
      {"modelopt",
       {{'P', 2048},
        {'Q', 2044},
        {'R', 2048},
        {'S', 2048},
        {'T', 2048},
        {'U', 2048},
        {'V', 774},
        {'W', 1008}}},
      {"slides",
       {{'P', 2047},
        {'Q', 2044},
        {'R', 256},
        {'S', 1365},
        {'T', 128},
        {'U', 2047},
        {'V', 774},
        {'W', 1008}}},
  };
  for (const auto& [name, indices] : expected) {
    for (const auto& [histogram, index] : indices) {
      EXPECT_EQ(solve(variant(name), golden(histogram), 128).index, index) << name << histogram;
    }
  }
  EXPECT_EQ(solve(variant("horizon"), sums_of(golden('V'), 4), 128).index, 169);
  EXPECT_EQ(solve(variant("horizon"), sums_of(golden('W'), 4), 128).index, 256);
}

TEST(KlGolden, IndexOnSignedValues) {
  const std::map<int64_t, std::map<char, int64_t>> expected = {
      {255,
       {{'P', 3813}, {'Q', 3984}, {'R', 255}, {'S', 1136}, {'U', 4000}, {'V', 764}, {'W', 1008}}},
      {511,
       {{'P', 4000}, {'Q', 3966}, {'R', 4000}, {'S', 1144}, {'U', 4000}, {'V', 1000}, {'W', 1133}}},
  };
  for (const auto& [levels, indices] : expected) {
    for (const auto& [histogram, index] : indices) {
      EXPECT_EQ(solve(variant("tvm"), golden_signed(histogram), levels).index, index)
          << levels << histogram;
    }
  }
  const Solved single =
      solve(variant("onnxruntime"), mirrored(sums_of(golden('V'), 32)), 128, 1.0 / 64);
  EXPECT_EQ(single.objective.size(), 1u);
  EXPECT_EQ(single.threshold, 1.0);
  const Solved many =
      solve(variant("onnxruntime"), mirrored(sums_of(golden('V'), 2)), 128, 1.0 / 1024);
  EXPECT_EQ(many.objective.size(), 961u);
  EXPECT_EQ(many.index, 384);
  EXPECT_EQ(many.threshold, 0.3759765625);
}

TEST(KlGolden, ThresholdIsTheOriginals) {
  const double width = 1.0 / 2048;
  EXPECT_EQ(solve(variant("slides"), golden('V'), 128, width).threshold, 774.5 * width);
  EXPECT_EQ(solve(variant("ncnn"), golden('V'), 128, width).threshold, 645.5 * width);
  EXPECT_EQ(solve(variant("modelopt"), golden('V'), 128, width).threshold, 774 * width);
  EXPECT_EQ(solve(variant("horizon"), sums_of(golden('V'), 4), 128, 4 * width).threshold,
            169 * 4 * width);
  // Edge 4765 of 8001 bins on [-1, 1].
  EXPECT_NEAR(solve(variant("tvm"), golden_signed('V'), 255, 2.0 / 8001).threshold, 0.1911011,
              5e-8);
  EXPECT_DOUBLE_EQ(solve(variant("tvm"), golden_signed('U'), 255, 2.0 / 8001).threshold, 1.0);
}

// Not one bit of a divergence depends on compiler, instruction set or device: the hash is that of
// the first build.
TEST(KlGolden, DivergencesHaveTheSameBitsInEveryBuild) {
  uint64_t hash = 14695981039346656037u;
  for (const char histogram : {'P', 'Q', 'R', 'S', 'T', 'U', 'V', 'W'}) {
    for (const kl_testing::Variant& which : kl_testing::variants()) {
      const kl_plain::Counts half = sums_of(golden(histogram), 8);
      const bool is_signed = which.id == torch_ext::observers::KlVariant::tvm ||
                             which.id == torch_ext::observers::KlVariant::onnxruntime;
      for (const double value : solve(which, is_signed ? mirrored(half) : half, 48).objective)
        hash = (hash ^ __builtin_bit_cast(uint64_t, value)) * 1099511628211u;
    }
  }
  EXPECT_EQ(hash, 12393329720368803848u);
}

}  // namespace
