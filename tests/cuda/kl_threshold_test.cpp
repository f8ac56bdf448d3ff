#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cpu/driver.h"
#include "kl_histograms.h"
#include "machines.h"
#include "statistic_plain.h"

// The kernel of kl_threshold.cu, run on the host, against the CPU's, which tests/core compares with
// long double.
namespace {

using namespace torch_ext;
using observers::KlVariant;
using statistic_plain::Random;

struct Answer {
  std::vector<int64_t> index;
  std::vector<double> threshold;
};

Answer on_device(const std::vector<int64_t>& counts, const std::vector<double>& width,
                 int64_t levels, KlVariant variant) {
  const int64_t rows = static_cast<int64_t>(width.size());
  const int64_t bins = static_cast<int64_t>(counts.size()) / rows;
  Answer answer{std::vector<int64_t>(rows), std::vector<double>(rows)};
  machines::Scratch scratch(cuda::kl_threshold_scratch(rows, bins, levels, variant));
  cuda::kl_threshold(counts.data(), width.data(), rows, bins, levels, variant, answer.index.data(),
                     answer.threshold.data(), scratch.data(), nullptr);
  return answer;
}

// Bell-shaped, with holes, a peak or a far bin.
std::vector<int64_t> histograms(int64_t rows, int64_t bins, Random& random) {
  std::vector<int64_t> counts;
  for (int64_t row = 0; row < rows; ++row) {
    const double width = static_cast<double>(bins) / static_cast<double>(2 + random() % 8);
    for (int64_t j = 0; j < bins; ++j) {
      const double at = static_cast<double>(j) / width;
      const double mean = 1000 * std::exp(-at * at);
      counts.push_back(random() % 4 == 0 ? 0
                                         : static_cast<int64_t>(mean * (random() % 100) / 50.0));
    }
    if (row % 3 == 1) counts.back() = 3;
    if (row % 3 == 2) std::fill(counts.end() - bins, counts.end(), 0);
  }
  return counts;
}

TEST(KlThreshold, EveryVariantIsTheCpus) {
  Random random(31);
  for (const kl_testing::Variant& variant : kl_testing::variants()) {
    for (const auto& [rows, bins, levels] :
         {std::tuple<int64_t, int64_t, int64_t>{4, 300, 16}, {1, 2048, 128}, {7, 129, 8}}) {
      gpu::emulation::machine() = statistic_plain::pick(machines::kMachines, random);
      const auto counts = histograms(rows, bins, random);
      std::vector<double> width;
      for (int64_t row = 0; row < rows; ++row)
        width.push_back(0.01 * static_cast<double>(1 + random() % 9));
      Answer want{std::vector<int64_t>(rows), std::vector<double>(rows)};
      cpu::kl_threshold(counts.data(), width.data(), rows, bins, levels, variant.id,
                        want.index.data(), want.threshold.data());
      const Answer have = on_device(counts, width, levels, variant.id);
      EXPECT_EQ(have.index, want.index) << variant.name << " " << bins;
      EXPECT_EQ(have.threshold, want.threshold) << variant.name << " " << bins;
    }
  }
}

// Invalid rows, for which the op raises on the CPU.
TEST(KlThreshold, WrongRowsGiveNoThreshold) {
  gpu::emulation::machine() = machines::kMachines[0];
  const int64_t max_count = int64_t{1} << 53;
  std::vector<std::vector<int64_t>> rows(6, std::vector<int64_t>(600, 5));
  rows[1][599] = -1;
  rows[2][0] = max_count + 1;
  rows[3][0] = rows[3][599] = max_count - 100;
  std::fill(rows[4].begin(), rows[4].end(), max_count);
  const std::vector<double> width = {1, 1, 1, 1, 1, NAN};
  std::vector<int64_t> counts;
  for (const auto& row : rows) counts.insert(counts.end(), row.begin(), row.end());
  const Answer have = on_device(counts, width, 16, KlVariant::slides);
  EXPECT_GT(have.index[0], 0);
  EXPECT_TRUE(std::isfinite(have.threshold[0]));
  for (size_t row = 1; row < rows.size(); ++row) {
    EXPECT_EQ(have.index[row], -1) << row;
    EXPECT_TRUE(std::isnan(have.threshold[row])) << row;
  }
}

}  // namespace
