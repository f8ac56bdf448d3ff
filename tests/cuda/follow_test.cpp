#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "arrays.h"
#include "cpu/driver.h"
#include "cpu/map.h"
#include "machines.h"
#include "rule_table.h"
#include "solving.h"

// The kernel of follow.cu, run on the host, against the CPU's three steps.
namespace {

using namespace torch_ext;
using core::FakeQuantJob;
using core::SolveJob;
using statistic_plain::Memory;
using statistic_plain::Random;

template <class T>
struct Run {
  Memory statistic;
  std::vector<float> range, scale;
  std::vector<int32_t> zero_point;
  uint8_t solved;
  std::vector<T> out;
  std::vector<uint8_t> mask;

  Run(int64_t channels, int64_t inner, uint8_t solved)
      : statistic(channels, {0, 0}),
        range(2 * channels, 0.5f),
        scale(channels, 0.25f),
        zero_point(channels, 1),
        solved(solved),
        out(channels * inner),
        mask(channels * inner / 8) {
    // Every second channel has no range yet, which matters with averaging_constant 0.
    for (int64_t c = 0; c < channels; c += 2) range[2 * c] = range[2 * c + 1] = 0;
  }
};

template <class T>
class Follow : public testing::Test {};
using Types = testing::Types<float, double, core::half, core::bfloat16>;
TYPED_TEST_SUITE(Follow, Types);

TYPED_TEST(Follow, IsTheCpusThreeSteps) {
  using T = TypeParam;
  Random random(51);
  const int32_t rules_of_extrema[] = {solving::index_of<observers::MinMax>(),
                                      solving::index_of<observers::Clip>()};
  for (int trial = 0; trial < 40; ++trial) {
    gpu::emulation::machine() = machines::kMachines[trial % 5 == 2 ? 0 : trial % 5];
    gpu::emulation::machine().seed = trial;
    const int64_t channels = statistic_plain::between(1, 9, random);
    const int64_t inner = 8 * statistic_plain::between(1, trial % 4 == 0 ? 700 : 40, random);
    const int64_t numel = channels * inner;
    auto x = arrays::make_array<T>({channels, inner}, arrays::contiguous(2),
                                   statistic_plain::pick(statistic_plain::kKinds, random), random);
    // A channel without a finite value.
    if (trial % 3 == 0)
      for (int64_t i = 0; i < inner; ++i) arrays::store(NAN, x.storage[i]);
    const int32_t rule = rules_of_extrema[trial % 2];
    const core::Grid grid = trial % 4 == 1 ? statistic_plain::pick(solving::kFloatGrids, random)
                                           : statistic_plain::pick(solving::kGrids, random);
    const double options[] = {-1.5, 2};
    const double constant = statistic_plain::pick({0.0, 0.01, 1.0}, random);
    const uint8_t solved = random() % 3;  // 2: the range is held
    const bool masked = random() % 2 == 0;
    const core::Rounding rounding =
        trial % 5 == 0 ? core::Rounding::half_away : core::Rounding::half_even;
    Run<T> have(channels, inner, solved), want(channels, inner, solved);
    const auto jobs = [&](Run<T>& run) {
      return std::pair{SolveJob{rule, grid, options, run.statistic.raw(), run.range.data(),
                                run.scale.data(), run.zero_point.data(), &run.solved, constant},
                       FakeQuantJob{x.storage.data(),
                                    run.out.data(),
                                    masked ? run.mask.data() : nullptr,
                                    {1, channels, inner},
                                    run.scale.data(),
                                    run.zero_point.data(),
                                    grid,
                                    rounding,
                                    core::Mask::rounded}};
    };
    auto [job, map] = jobs(have);
    ASSERT_TRUE(cuda::follows_on_chip(rule, arrays::kDType<T>, map));
    const int64_t before = gpu::emulation::launches();
    cuda::follow_on_chip(job, arrays::kDType<T>, map, nullptr);
    ASSERT_EQ(gpu::emulation::launches(), before + 1);

    auto [plain_job, plain_map] = jobs(want);
    if (constant != 0 || solved == 0) {
      cpu::observe(x.view(), 0, want.statistic.raw());
      cpu::solve(&plain_job, 1);
    }
    cpu::fake_quant_forward(arrays::kDType<T>, plain_map);
    ASSERT_EQ(std::memcmp(have.range.data(), want.range.data(), 8 * channels), 0) << trial;
    ASSERT_EQ(std::memcmp(have.scale.data(), want.scale.data(), 4 * channels), 0) << trial;
    ASSERT_EQ(have.zero_point, want.zero_point) << trial;
    ASSERT_EQ(have.solved, want.solved) << trial;
    if (solved != 0) {
      ASSERT_EQ(have.solved, solved) << trial;
    }
    ASSERT_EQ(have.mask, want.mask) << trial;
    for (int64_t i = 0; i < numel; ++i) {
      const auto a = core::widen(have.out[i]), b = core::widen(want.out[i]);
      ASSERT_TRUE(a == b || (std::isnan(a) && std::isnan(b))) << trial << " element " << i;
    }
  }
}

TEST(FollowOnChip, OnlyWhereARowFits) {
  gpu::emulation::machine() = machines::kMachines[1];
  alignas(16) float memory[16] = {};
  const int32_t rule = solving::index_of<observers::MinMax>();
  const auto fits = [&](core::ChannelLayout layout, const float* x = nullptr,
                        core::DType dtype = core::DType::f32) {
    return cuda::follows_on_chip(rule, dtype,
                                 {x == nullptr ? memory : x,
                                  memory,
                                  nullptr,
                                  layout,
                                  nullptr,
                                  nullptr,
                                  {-128, 127},
                                  core::Rounding::half_even,
                                  core::Mask::rounded});
  };
  EXPECT_TRUE(fits({1, 64, 576}));
  EXPECT_TRUE(fits({1, 1, 16384}));
  EXPECT_FALSE(fits({1, 64, 576}, memory + 1)) << "not aligned";
  EXPECT_FALSE(fits({1, 64, 9})) << "bytes of the mask shared by rows";
  EXPECT_FALSE(fits({2, 64, 576})) << "a channel is two rows";
  EXPECT_FALSE(fits({1, 64, 32768})) << "a row of 128 KiB";
  EXPECT_TRUE(fits({1, 64, 32768}, nullptr, core::DType::f16));
  EXPECT_FALSE(fits({1, 8, 16384})) << "eight blocks at work";
}

}  // namespace
