#include "observers/kl_reference.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "kl_histograms.h"

namespace {

using kl_plain::Counts;
using kl_plain::Curve;
using kl_plain::Real;
using kl_testing::golden;
using kl_testing::golden_signed;
using kl_testing::random_histogram;
using kl_testing::solve;
using kl_testing::Solved;
using kl_testing::sums_of;
using kl_testing::Variant;
using kl_testing::variant;
using kl_testing::variants;
using torch_ext::observers::KlReference;
using torch_ext::observers::KlVariant;

struct Comparison {
  double worst = 0;       // |fast - plain| / (1 + |plain|)
  int64_t near_ties = 0;  // other index, objective within rounding of the bound for ties
  int64_t wrong = 0;
};

void compare(const Variant& which, const Counts& counts, int64_t levels, Comparison& into) {
  const Curve plain = which.plain(counts, levels);
  const Solved fast = solve(which, counts, levels);
  ASSERT_EQ(fast.objective.size(), plain.value.size()) << which.name;
  Real least = kl_plain::kInfinity;
  for (size_t i = 0; i < plain.value.size(); ++i) {
    ASSERT_EQ(std::isinf(fast.objective[i]), std::isinf(plain.value[i])) << which.name << " " << i;
    ASSERT_FALSE(std::isnan(fast.objective[i])) << which.name << " " << i;
    least = std::min(least, plain.value[i]);
    if (std::isinf(plain.value[i])) continue;
    const Real error = fabsl(fast.objective[i] - plain.value[i]) / (1 + fabsl(plain.value[i]));
    into.worst = std::max(into.worst, static_cast<double>(error));
  }
  const Real bound = least + 1e-12L * fabsl(least) + 1e-14L;
  int64_t winner = -1;
  for (size_t i = 0; i < plain.value.size() && least < kl_plain::kInfinity; ++i) {
    if (plain.value[i] <= bound && (which.last_wins || winner < 0))
      winner = static_cast<int64_t>(i);
  }
  if (winner == fast.winner) {
    const auto bins = static_cast<int64_t>(counts.size());
    const bool is_signed = which.id == KlVariant::tvm || which.id == KlVariant::onnxruntime;
    EXPECT_EQ(fast.index, winner < 0 ? (is_signed ? bins / 2 : bins) : plain.first + winner);
    return;
  }
  const bool near = winner >= 0 && fast.winner >= 0 &&
                    plain.value[fast.winner] <= bound + 1e-14L * (1 + fabsl(least));
  (near ? into.near_ties : into.wrong) += 1;
  EXPECT_TRUE(near) << which.name << " levels " << levels << " bins " << counts.size() << ": "
                    << fast.winner << " instead of " << winner;
}

TEST(KlReference, EqualsThePlainSearchOnRandomHistograms) {
  std::mt19937_64 random(11);
  std::map<std::string, Comparison> results;
  for (int i = 0; i < 520; ++i) {
    const auto bins = static_cast<int64_t>(20 + random() % 150);
    const int64_t levels = i % 4 == 0 ? 16 : static_cast<int64_t>(2 + random() % 40);
    const Counts counts = random_histogram(random, bins, i % 10, i / 10 % 2 == 1, i % 3 == 0);
    for (const Variant& which : variants()) compare(which, counts, levels, results[which.name]);
  }
  for (const auto& [name, result] : results) {
    EXPECT_EQ(result.wrong, 0) << name;
    EXPECT_LE(result.near_ties, 3) << name;
    EXPECT_LT(result.worst, 1e-14) << name;
  }
}

TEST(KlReference, EqualsThePlainSearchAtTheUsualSizes) {
  std::mt19937_64 random(12);
  Comparison result;
  for (int kind = 0; kind < 10; ++kind) {
    const Counts counts = random_histogram(random, 512, kind, false, kind % 3 == 0);
    for (const char* name : {"slides", "modelopt", "ncnn", "horizon"})
      compare(variant(name), counts, 128, result);
    const Counts centered =
        random_histogram(random, kind % 2 == 0 ? 501 : 500, kind, true, kind < 5);
    for (const char* name : {"tvm", "onnxruntime"}) compare(variant(name), centered, 128, result);
  }
  for (const char histogram : {'R', 'V', 'W'}) {
    for (const char* name : {"slides", "modelopt", "ncnn", "horizon"})
      compare(variant(name), golden(histogram), 128, result);
  }
  compare(variant("tvm"), golden_signed('V'), 255, result);
  EXPECT_EQ(result.wrong, 0);
  EXPECT_LT(result.worst, 2e-14);
}

TEST(KlReference, EqualsThePlainSearchOnFewBinsAndLevels) {
  std::mt19937_64 random(13);
  Comparison result;
  for (int64_t bins = 1; bins <= 40; ++bins) {
    for (int64_t levels = 2; levels <= 12; ++levels) {
      const int kind = static_cast<int>(random() % 10);
      const Counts counts = random_histogram(random, bins, kind, bins % 2 == 0, levels % 3 == 0);
      for (const Variant& which : variants()) compare(which, counts, levels, result);
    }
  }
  EXPECT_EQ(result.wrong, 0);
  EXPECT_LT(result.worst, 1e-14);
}

// Ones in every k-th bin: smoothing takes 1e-4 (k-1) from each. From k = 51 on the sum over the
// bins replaces the series.
TEST(KlReference, EqualsThePlainSearchWhereSmoothingIsLarge) {
  Comparison result;
  for (const int64_t distance : {10, 30, 45, 50, 51, 52, 60, 200}) {
    Counts counts(801);
    for (int64_t j = 400 % distance; j < 801; j += distance) counts[j] = 1;
    for (const char* name : {"tvm", "onnxruntime"}) compare(variant(name), counts, 20, result);
  }
  EXPECT_EQ(result.wrong, 0);
  EXPECT_LT(result.worst, 1e-14);
}

// Sums beyond 2^53 are rounded; the answer stays near the exact one and finite.
TEST(KlReference, CountsPastTheMantissaAreNotFatal) {
  std::mt19937_64 random(14);
  Comparison result;
  for (int i = 0; i < 20; ++i) {
    Counts counts(100 + random() % 100);
    for (int64_t& count : counts) count = static_cast<int64_t>(random() >> (1 + random() % 8));
    for (const Variant& which : variants()) {
      const Solved fast = solve(which, counts, 16);
      const Curve plain = which.plain(counts, 16);
      ASSERT_GE(fast.winner, 0);
      const Real least = *std::min_element(plain.value.begin(), plain.value.end());
      EXPECT_LT(static_cast<double>(plain.value[fast.winner] - least), 1e-12) << which.name;
    }
  }
}

// ---- properties
// -------------------------------------------------------------------------------------

TEST(KlReference, HasTheSameBitsForAnyLanesAndAnyPartition) {
  std::mt19937_64 random(15);
  for (int kind = 0; kind < 10; ++kind) {
    const Counts counts = random_histogram(random, 333, kind, kind % 2 == 0, kind % 3 == 0);
    for (const Variant& which : variants()) {
      const std::vector<double> wide = solve<16>(which, counts, 21).objective;
      const std::vector<double> single = solve<1>(which, counts, 21).objective;
      ASSERT_EQ(std::memcmp(wide.data(), single.data(), wide.size() * sizeof(double)), 0)
          << which.name << kind;
      std::vector<double> scratch(KlReference::scratch_size(which.id, 333));
      const auto search = KlReference::prepare(which.id, counts.data(), 333, 21, scratch.data());
      std::vector<double> pieces(search.count);
      for (int64_t i = 0; i < search.count;) {
        const int64_t end =
            std::min<int64_t>(search.count, i + 1 + static_cast<int64_t>(random() % 40));
        KlReference::objectives<16>(search, i, end, pieces.data() + i);
        i = end;
      }
      ASSERT_EQ(std::memcmp(wide.data(), pieces.data(), wide.size() * sizeof(double)), 0)
          << which.name << kind;
    }
  }
}

TEST(KlReference, ScalingAllCountsKeepsTheIndex) {
  for (const char histogram : {'P', 'V', 'W'}) {
    for (const char* name : {"slides", "modelopt", "ncnn", "horizon"}) {
      Counts counts = sums_of(golden(histogram), 4);
      const int64_t index = solve(variant(name), counts, 64).index;
      for (const int64_t factor : {2, 3, 1000003}) {
        Counts scaled = counts;
        for (int64_t& count : scaled) count *= factor;
        EXPECT_EQ(solve(variant(name), scaled, 64).index, index) << name << histogram << factor;
      }
    }
  }
}

TEST(KlReference, WithoutACandidateTheWholeHistogramIsKept) {
  for (const Variant& which : variants()) {
    const bool is_signed = which.id == KlVariant::tvm || which.id == KlVariant::onnxruntime;
    const bool centers_bin = which.id == KlVariant::slides || which.id == KlVariant::ncnn;
    for (const Counts& counts : {Counts(300), Counts(5, 1), Counts{7}, Counts(300, -1)}) {
      const auto bins = static_cast<int64_t>(counts.size());
      const Solved solved = solve(which, counts, 128, 0.5);
      EXPECT_EQ(solved.winner, -1) << which.name << bins;
      EXPECT_EQ(solved.index, is_signed ? bins / 2 : bins) << which.name << bins;
      const double expected = is_signed ? 0.25 * bins : 0.5 * (bins + (centers_bin ? 0.5 : 0.0));
      EXPECT_EQ(solved.threshold, expected) << which.name << bins;
    }
  }
}

// slides: outliers on an empty last bin have Q = 0, so everything in the last bin leaves no
// candidate.
TEST(KlReference, AllMassInOneBin) {
  for (const int64_t at : {0, 1, 100, 254, 255}) {
    Counts counts(256);
    counts[at] = 12345;
    EXPECT_EQ(solve(variant("slides"), counts, 16).index,
              at == 255 ? 256 : std::max<int64_t>(16, at + 1));
    // Bin 0 takes the count of bin 1.
    EXPECT_EQ(solve(variant("modelopt"), counts, 16).index, 256) << at;
    for (const Variant& which : variants()) {
      const double threshold = solve(which, counts, 16, 0.5).threshold;
      EXPECT_TRUE(threshold > 0 && threshold <= 128.25) << which.name << at;
    }
  }
}

TEST(KlReference, TheLargestCountsAreFinite) {
  const Counts counts(64, std::numeric_limits<int64_t>::max());
  for (const Variant& which : variants()) {
    const Solved solved = solve(which, counts, 8);
    for (const double objective : solved.objective)
      EXPECT_TRUE(std::isfinite(objective)) << which.name;
  }
}

}  // namespace
