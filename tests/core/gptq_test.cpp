#include "cpu/gptq.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "parallel_threads.h"

namespace {

using namespace torch_ext;
using cpu::GptqJob;

template <typename T>
struct Problem {
  int64_t groups, rows, inputs;
  std::vector<T> weight, out;
  std::vector<double> factor;
  std::vector<float> scale;
  std::vector<int32_t> zero_point;

  // Random, with one scale a row and the zero point of each value its own.
  Problem(int64_t groups, int64_t rows, int64_t inputs, bool identity = false)
      : groups(groups), rows(rows), inputs(inputs) {
    std::mt19937_64 random(static_cast<uint64_t>(groups * 10007 + rows * 101 + inputs));
    std::normal_distribution<double> normal;
    weight.resize(groups * rows * inputs);
    for (T& w : weight) w = static_cast<T>(normal(random));
    out.resize(weight.size());
    factor.resize(groups * inputs * inputs);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < inputs; ++i)
        for (int64_t j = 0; j < inputs; ++j) {
          // Below the diagonal nothing is read.
          double value = j < i ? std::nan("") : normal(random) * 0.2;
          if (i == j) value = 0.5 + std::fabs(value);
          if (identity && j >= i) value = i == j;
          factor[(g * inputs + i) * inputs + j] = value;
        }
    for (int64_t r = 0; r < groups * rows; ++r)
      scale.push_back(0.05f + 0.01f * static_cast<float>(r % 7));
    for (size_t i = 0; i < weight.size(); ++i)
      zero_point.push_back(static_cast<int32_t>(i % 3) - 1);
  }

  GptqJob job() {
    return {groups,       rows,
            inputs,       weight.data(),
            out.data(),   factor.data(),
            scale.data(), zero_point.data(),
            {rows, 1, 0}, {rows * inputs, inputs, 1},
            {-8, 7},      core::Rounding::half_even};
  }
};

// The same in the plainest way: no blocks, no tiles, one row after the other.
template <typename T>
std::vector<T> plain(const Problem<T>& p) {
  std::vector<T> out(p.weight.size());
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t r = 0; r < p.rows; ++r) {
      const int64_t start = (g * p.rows + r) * p.inputs;
      std::vector<double> w(p.weight.begin() + start, p.weight.begin() + start + p.inputs);
      const double* const factor = p.factor.data() + g * p.inputs * p.inputs;
      const T scale = static_cast<T>(p.scale[g * p.rows + r]);
      for (int64_t j = 0; j < p.inputs; ++j) {
        const T zero = static_cast<T>(p.zero_point[start + j]);
        const T code = std::clamp(std::nearbyint(static_cast<T>(w[j]) / scale) + zero, T{-8}, T{7});
        const T value = (code - zero) * scale;
        out[start + j] = value;
        const double error = (w[j] - static_cast<double>(value)) / factor[j * p.inputs + j];
        for (int64_t k = j + 1; k < p.inputs; ++k) w[k] -= error * factor[j * p.inputs + k];
      }
    }
  return out;
}

template <typename T>
class GptqTyped : public testing::Test {};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(GptqTyped, Types);

template <typename T>
constexpr core::DType kDType = sizeof(T) == 4 ? core::DType::f32 : core::DType::f64;

// Around the widths of tiles (16 rows), blocks (64 inputs) and pieces (32).
constexpr int64_t kSizes[][3] = {{1, 1, 1},    {1, 1, 9},    {5, 1, 9},    {3, 2, 25},  {1, 15, 63},
                                 {1, 16, 64},  {1, 17, 65},  {2, 5, 95},   {1, 33, 96}, {1, 3, 97},
                                 {1, 40, 128}, {2, 18, 129}, {1, 20, 160}, {1, 5, 161}, {1, 7, 300},
                                 {300, 1, 4},  {0, 3, 5},    {2, 0, 5},    {2, 3, 0}};

TYPED_TEST(GptqTyped, EveryInstructionSetEqualsThePlainLoopBitForBit) {
  using T = TypeParam;
  for (const auto& [groups, rows, inputs] : kSizes) {
    Problem<T> p(groups, rows, inputs);
    const std::vector<T> want = plain(p);
    for (auto set = cpu::runnable_kernels(); *set != nullptr; ++set) {
      std::fill(p.out.begin(), p.out.end(), T{99});
      const GptqJob job = p.job();
      const auto round = sizeof(T) == 4 ? (*set)->gptq.rows_f32 : (*set)->gptq.rows_f64;
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t first = 0; first < rows; first += cpu::kGptqRows) {
          const int64_t count = std::min(rows - first, cpu::kGptqRows);
          std::vector<double> work(count * inputs);
          round(job, g, first, count, work.data());
        }
      EXPECT_EQ(std::memcmp(p.out.data(), want.data(), want.size() * sizeof(T)), 0)
          << (*set)->name << " [" << groups << "," << rows << "," << inputs << "]";
    }
  }
}

TYPED_TEST(GptqTyped, ResultsDoNotDependOnTheNumberOfThreads) {
  using T = TypeParam;
  const int64_t threads = cpu::test_threads();
  for (const auto& [groups, rows, inputs] : kSizes) {
    Problem<T> p(groups, rows, inputs);
    const std::vector<T> want = plain(p);
    for (const int64_t count : {1, 2, 5}) {
      cpu::test_threads() = count;
      std::fill(p.out.begin(), p.out.end(), T{99});
      cpu::gptq(kDType<T>, p.job());
      EXPECT_EQ(std::memcmp(p.out.data(), want.data(), want.size() * sizeof(T)), 0) << count;
    }
  }
  cpu::test_threads() = threads;
}

TYPED_TEST(GptqTyped, TheIdentityGivesTheNearestValues) {
  using T = TypeParam;
  Problem<T> p(2, 19, 130, true);
  cpu::gptq(kDType<T>, p.job());
  for (size_t i = 0; i < p.weight.size(); ++i) {
    const float scale = p.scale[i / p.inputs];
    const core::UnitGrid<T> grid =
        core::make_unit_grid<T>(scale, p.zero_point[i], core::Codes{-8, 7});
    ASSERT_EQ(p.out[i], core::dequantize(core::quantize(p.weight[i], grid), grid)) << i;
  }
}

}  // namespace
