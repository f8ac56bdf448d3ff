#include <gtest/gtest.h>

#include <vector>

#include "cpu/driver.h"
#include "machines.h"
#include "statistic_plain.h"

// The kernel of merge.cu, run on the host.
namespace {

using namespace torch_ext;
using core::HistogramLayout;
using statistic_plain::between;
using statistic_plain::kKinds;
using statistic_plain::kLayouts;
using statistic_plain::Memory;
using statistic_plain::pick;
using statistic_plain::Random;
using statistic_plain::Values;

TEST(Merge, IsTheStatisticOfAllValues) {
  Random random(21);
  for (int trial = 0; trial < 60; ++trial) {
    gpu::emulation::machine() = pick(machines::kMachines, random);
    gpu::emulation::machine().seed = trial;
    const HistogramLayout layout = trial % 6 == 0 ? HistogramLayout{0, 0} : pick(kLayouts, random);
    const int64_t channels = between(1, 4, random);
    Memory into(channels, layout), from(channels, layout);
    std::vector<Values> all(channels);
    for (Memory* memory : {&into, &from}) {
      const double scale = std::ldexp(1.0, static_cast<int>(between(-12, 12, random)));
      for (int64_t c = 0; c < channels; ++c) {
        Values x = statistic_plain::sample(pick(kKinds, random), between(0, 300, random), random);
        for (float& each : x) each = static_cast<float>(each * scale);
        all[c].insert(all[c].end(), x.begin(), x.end());
        const core::Statistic raw = memory->raw();
        const core::ChannelStatistic channel = raw.channel(c);
        const int64_t n = static_cast<int64_t>(x.size()), stride = 1;
        cpu::observe({x.data(), core::DType::f32, 1, &n, &stride}, -1,
                     {channel.extrema, channel.tally, channel.counts, 1, layout});
      }
    }
    cuda::merge(into.raw(), from.raw(), nullptr);
    for (int64_t c = 0; c < channels; ++c)
      ASSERT_TRUE(statistic_plain::counts_values(into, c, all[c])) << trial;
  }
}

}  // namespace
