#include <gtest/gtest.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <vector>

#include "cpu/accumulator.h"
#include "cpu/driver.h"
#include "cpu/kernels.h"
#include "parallel_threads.h"
#include "statistic_plain.h"

// A statistic is a function of the multiset of values: not of their order, their split into batches
// or ranks, the way the window grew, or the instruction set.
namespace {

using namespace torch_ext;
using core::HistogramLayout;
using statistic_plain::between;
using statistic_plain::counts_values;
using statistic_plain::Kind;
using statistic_plain::kInfinity;
using statistic_plain::kKinds;
using statistic_plain::kLayouts;
using statistic_plain::Memory;
using statistic_plain::pick;
using statistic_plain::Random;
using statistic_plain::sample;
using statistic_plain::Values;

void observe(const float* x, int64_t n, Memory& into) {
  const int64_t stride = 1;
  cpu::observe({x, core::DType::f32, 1, &n, &stride}, -1, into.raw());
}
void observe(const Values& values, Memory& into) {
  observe(values.data(), static_cast<int64_t>(values.size()), into);
}

// A mixture of kinds at several magnitudes.
Values mixed(int64_t n, Random& random) {
  Values values;
  while (static_cast<int64_t>(values.size()) < n) {
    const int shift = static_cast<int>(between(-30, 30, random));
    for (const float x : sample(pick(kKinds, random), between(1, 1 + n / 2, random), random))
      values.push_back(std::ldexp(x, shift));
  }
  values.resize(n);
  return values;
}

TEST(ObserveLaws, AnySplitAndOrderOfBatches) {
  Random random(41);
  for (int trial = 0; trial < 120; ++trial) {
    SCOPED_TRACE(trial);
    cpu::test_threads() = between(1, 8, random);
    Values values = mixed(pick({300, 3000, 30000}, random), random);
    const HistogramLayout layout = pick(kLayouts, random);
    Memory memory(1, layout);
    std::shuffle(values.begin(), values.end(), random);
    const auto n = static_cast<int64_t>(values.size());
    for (int64_t begin = 0; begin < n;) {
      const int64_t size = std::min(n - begin, between(0, 2 * n / 3, random));
      observe(values.data() + begin, size, memory);
      begin += size;
    }
    ASSERT_TRUE(counts_values(memory, 0, values));
  }
  cpu::test_threads() = 2;
}

TEST(ObserveLaws, OneToEightRanksInAnyOrderOfMerges) {
  Random random(42);
  for (int trial = 0; trial < 100; ++trial) {
    SCOPED_TRACE(trial);
    const Values values = mixed(pick({100, 5000}, random), random);
    const HistogramLayout layout = pick(kLayouts, random);
    const int64_t ranks = 1 + trial % 8;
    std::vector<Values> shards(ranks);
    for (const float x : values) shards[random() % ranks].push_back(x);
    std::vector<Memory> states;
    for (const Values& shard : shards) {
      states.emplace_back(1, layout);
      observe(shard, states.back());
    }
    while (states.size() > 1) {
      std::shuffle(states.begin(), states.end(), random);
      cpu::merge(states[0].raw(), states.back().raw());
      states.pop_back();
    }
    ASSERT_TRUE(counts_values(states[0], 0, values));
  }
}

TEST(ObserveLaws, MergingManyChannelsIsMergingEach) {
  Random random(43);
  const HistogramLayout layout{7, 12};
  constexpr int64_t kChannels = 300;
  Memory into(kChannels, layout), from(kChannels, layout);
  std::vector<Values> all(kChannels);
  for (Memory* memory : {&into, &from}) {
    const Values x = mixed(kChannels * 20, random);
    const int64_t sizes[] = {kChannels, 20}, strides[] = {20, 1};
    cpu::observe({x.data(), core::DType::f32, 2, sizes, strides}, 0, memory->raw());
    for (int64_t i = 0; i < kChannels * 20; ++i) all[i / 20].push_back(x[i]);
  }
  cpu::test_threads() = 8;
  cpu::merge(into.raw(), from.raw());
  cpu::test_threads() = 2;
  for (int64_t c = 0; c < kChannels; ++c) ASSERT_TRUE(counts_values(into, c, all[c]));
}

// Batches of size n whose magnitude follows a schedule.
void expect_growth(const std::vector<double>& scales, int64_t n, HistogramLayout layout) {
  Random random(44);
  Memory memory(1, layout);
  Values seen;
  for (const double scale : scales) {
    Values batch = sample(Kind::gauss, n, random);
    for (float& x : batch) x = static_cast<float>(x * scale);
    observe(batch, memory);
    seen.insert(seen.end(), batch.begin(), batch.end());
    ASSERT_TRUE(counts_values(memory, 0, seen)) << "at scale " << scale;
  }
}

TEST(ObserveGrowth, AnyScheduleFewAndManyValues) {
  const std::vector<double> schedules[] = {{1e-20, 1e20},
                                           {1e-30, 1e-27, 1e-24, 1e-21, 1e-18, 1, 1e3, 1e6},
                                           {1e6, 1, 1e-6, 1e7},
                                           {1e-44, 1e-39, 1e-37, 1e-36},  // out of the subnormals
                                           {1, 2, 4, 8, 16, 32, 64},
                                           {0, 1e-45, 0, 3e37}};
  for (const auto& scales : schedules) {
    for (const HistogramLayout layout : kLayouts) {
      for (const int64_t n : {5, 2500, 4096, 9000}) {
        expect_growth(scales, n, layout);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// The window grows within one call, from group to group and inside one.
TEST(ObserveGrowth, WithinOneCall) {
  for (const int64_t n : {1500, 4095, 4096, 20000}) {
    for (const double ratio : {1.001, 1.01, 2.0}) {
      Values rising(n);
      double x = ratio == 2.0 ? 1e-40 : 1e-6;
      for (float& value : rising) {
        value = static_cast<float>(x);
        x = -x * ratio;
        if (std::fabs(x) > 1e38) x = 1e-40;
      }
      for (const HistogramLayout layout : kLayouts) {
        Memory memory(1, layout);
        observe(rising, memory);
        EXPECT_TRUE(counts_values(memory, 0, rising)) << n << " values, ratio " << ratio;
      }
    }
  }
}

// Narrow counters carry at 256 and 2^16 equal values, odd positions and even ones.
TEST(ObserveCarries, EqualValues) {
  for (const int64_t n : {4096, 4097, 65535, 65536, 131072, 131073, 200003}) {
    Values values(n, 1.25f);
    for (int64_t i = 0; i < n; i += 97) values[i] = -1.25f;
    for (int64_t i = 5; i < n; i += 1001) values[i] = 0;
    for (const HistogramLayout layout : {HistogramLayout{10, 16}, {5, 4}}) {
      Memory memory(1, layout);
      observe(values, memory);
      EXPECT_TRUE(counts_values(memory, 0, values)) << n;
    }
  }
}

TEST(ObserveCarries, EveryNumberOfEqualValuesNear256And512) {
  Values filler(4096, 0.0f);
  for (int64_t n = 250; n <= 1030; n += n % 256 < 8 || n % 256 > 248 ? 1 : 37) {
    Values values = filler;
    for (int64_t i = 0; i < n; ++i) values[i * 3 % 4093] = 3.0f;
    Memory memory(1, {10, 16});
    observe(values, memory);
    EXPECT_TRUE(counts_values(memory, 0, values)) << n;
  }
}

// More than 2^32 values in memory of 2^16: the rows overlap.
TEST(ObserveCarries, MoreValuesThan2To31) {
  Values row(1 << 16, 1.0f);
  row[1] = -2.0f;
  row[2] = 0;
  row[3] = kInfinity;
  const int64_t sizes[] = {32769, 1 << 16}, strides[] = {0, 1};
  Memory memory(1, {10, 16});
  cpu::observe({row.data(), core::DType::f32, 2, sizes, strides}, -1, memory.raw());
  const int64_t want[] = {32769 * 65535LL, 32769, 0, 32769, 0};
  EXPECT_TRUE(std::equal(want, want + 5, memory.tally(0)))
      << statistic_plain::text(memory.tally(0), 5);
  EXPECT_EQ(memory.counts(0)[statistic_plain::bin_of(1, {10, 16})], 32769 * 65533LL);
}

// The same for adjacent channels without a histogram.
TEST(ObserveCarries, MoreRowsThan2To31) {
  const Values rows(1 << 17, 0.0f);
  const int64_t sizes[] = {32769, 1 << 16, 2}, strides[] = {0, 2, 1};
  Memory memory(2, {0, 0});
  cpu::test_threads() = 1;  // one thread counts all of them
  cpu::observe({rows.data(), core::DType::f32, 3, sizes, strides}, 2, memory.raw());
  cpu::test_threads() = 2;
  for (int64_t c = 0; c < 2; ++c) EXPECT_EQ(memory.tally(c)[core::kZeros], 32769LL << 16);
}

// The inner loops of every instruction set, called directly, in groups of any size.
TEST(ObserveKernels, CountTheSameWithEveryInstructionSet) {
  Random random(45);
  for (int trial = 0; trial < 150; ++trial) {
    SCOPED_TRACE(trial);
    const Values values = mixed(pick({50, 1024, 6000}, random), random);
    const auto n = static_cast<int64_t>(values.size());
    const HistogramLayout layout = pick(kLayouts, random);
    const bool direct = trial % 2 == 0;
    const uint64_t cut = random();
    for (const cpu::Kernels* const* set = cpu::runnable_kernels(); *set != nullptr; ++set) {
      SCOPED_TRACE((*set)->name);
      Memory memory(1, layout);
      cpu::Accumulator accumulator((*set)->accumulate, layout, memory.channel(0), direct);
      Random cuts(cut);
      for (int64_t begin = 0; begin < n;) {
        const int64_t size = std::min(n - begin, between(0, cpu::kGroup, cuts));
        accumulator.add(values.data() + begin, size);
        begin += size;
      }
      accumulator.finish();
      ASSERT_TRUE(counts_values(memory, 0, values));
    }
  }
}

#if defined(__SSE__)
// A program may flush subnormals to zero; the statistic does not change.
TEST(ObserveKernels, IgnoreTheDenormalMode) {
  Random random(46);
  Values values = sample(Kind::subnormal, 5000, random);
  for (float& x : values)
    if (random() % 9 == 0) x = 0x1p-126f;
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x40;
  const unsigned before = _mm_getcsr();
  for (const int64_t n : {1, 100, 5000}) {
    Memory memory(1, {10, 16});
    _mm_setcsr(before | kFlushToZero | kDenormalsAreZero);
    observe(values.data(), n, memory);
    _mm_setcsr(before);
    EXPECT_TRUE(counts_values(memory, 0, {values.begin(), values.begin() + n})) << n;
  }
}
#endif

}  // namespace
