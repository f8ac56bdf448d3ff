#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "arrays.h"
#include "cpu/driver.h"
#include "cpu/kernels.h"
#include "parallel_threads.h"

// cpu::observe chooses how to read by the number of values, the length of rows and the number of
// channels. Sizes around each of these limits, against counting each value by its definition.
namespace {

using namespace torch_ext;
using arrays::contiguous;
using arrays::make_array;
using arrays::Placement;
using core::HistogramLayout;
using statistic_plain::all_count;
using statistic_plain::between;
using statistic_plain::counts_values;
using statistic_plain::Kind;
using statistic_plain::kKinds;
using statistic_plain::kLayouts;
using statistic_plain::Memory;
using statistic_plain::pick;
using statistic_plain::Random;
using statistic_plain::sample;
using statistic_plain::Values;

template <class T>
class ObserveSizes : public testing::Test {
 protected:
  void TearDown() override { cpu::test_threads() = 2; }

  // Observes an array of random values twice and compares all channels.
  void expect_counted(const std::vector<int64_t>& sizes, const Placement& placement, int axis,
                      HistogramLayout layout) {
    std::string text;
    for (const int64_t size : sizes) text += std::to_string(size) + " ";
    SCOPED_TRACE("sizes " + text + "axis " + std::to_string(axis));
    cpu::test_threads() = between(1, 5, random_);
    const int64_t channels = axis < 0 ? 1 : sizes[axis];
    Memory memory(channels, layout);
    std::vector<Values> seen(channels);
    for (int batch = 0; batch < 2; ++batch) {
      const auto x = make_array<T>(sizes, placement, pick(kKinds, random_), random_);
      cpu::observe(x.view(), axis, memory.raw());
      x.append_to(seen, axis);
    }
    ASSERT_TRUE(all_count(memory, seen));
  }

  Random random_{61};
};
using Types = testing::Types<float, double, core::half, core::bfloat16>;
TYPED_TEST_SUITE(ObserveSizes, Types);

constexpr HistogramLayout kExtremaOnly = {0, 0};

// Rows of a channel each, side by side or with a gap, once or several times.
TYPED_TEST(ObserveSizes, RowsOfAnyLength) {
  std::vector<int64_t> lengths;
  for (int64_t n = 1; n <= 70; ++n) lengths.push_back(n);
  for (const int64_t n : {96, 127, 128, 255, 257, 1000, 4095, 4096, 4097}) lengths.push_back(n);
  for (const int64_t length : lengths) {
    const int64_t channels = between(1, length > 300 ? 18 : 70, this->random_);
    Placement placement = contiguous(3);
    placement.gap[1] = between(1, 2, this->random_);
    this->expect_counted({between(1, 3, this->random_), channels, length}, placement, 1,
                         kExtremaOnly);
    if (this->HasFatalFailure()) return;
  }
}

TYPED_TEST(ObserveSizes, RowsOfMoreChannelsThanABlock) {
  for (const int64_t channels : {1023, 1024, 1025, 2050}) {
    this->expect_counted({channels, between(1, 20, this->random_)}, contiguous(2), 0, kExtremaOnly);
    if (this->HasFatalFailure()) return;
  }
}

// Few channels are read as if they were many, several rows at a time.
TYPED_TEST(ObserveSizes, AnyNumberOfAdjacentChannels) {
  std::vector<int64_t> numbers;
  for (int64_t n = 1; n <= 20; ++n) numbers.push_back(n);
  for (const int64_t n : {31, 100, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 2050})
    numbers.push_back(n);
  for (const int64_t channels : numbers) {
    Placement placement = contiguous(3);
    placement.gap[1] = between(1, 2, this->random_);
    const int64_t rows = between(1, 1 + 3000 / channels, this->random_);
    this->expect_counted({between(1, 2, this->random_), rows, channels}, placement, 2,
                         kExtremaOnly);
    if (this->HasFatalFailure()) return;
  }
}

// Of many values, more rows are read as one; each thread has so many.
TYPED_TEST(ObserveSizes, ManyValuesOfAdjacentChannels) {
  for (const int64_t channels : {3, 257}) {
    this->expect_counted({(5 << 17) / channels + 1, channels}, contiguous(2), 1, kExtremaOnly);
    if (this->HasFatalFailure()) return;
  }
}

// Straight into the statistic, by narrow tables, by the patterns of 16-bit types.
TYPED_TEST(ObserveSizes, NumbersOfValuesAroundEachLimit) {
  for (const int64_t limit : {1 << 10, 1 << 14, 1 << 15, 1 << 16, 1 << 18}) {
    for (const int64_t n : {limit - 1, limit, limit + between(1, 40, this->random_)}) {
      Placement placement = contiguous(1);
      placement.gap[0] = between(1, 8, this->random_) == 1 ? 2 : 1;
      this->expect_counted({n}, placement, -1, pick(kLayouts, this->random_));
      if (this->HasFatalFailure()) return;
    }
  }
}

TYPED_TEST(ObserveSizes, SeveralRunsOfManyValues) {
  for (const int64_t n : {1 << 16, 1 << 18}) {
    Placement placement = contiguous(2);
    placement.gap[1] = 2;
    this->expect_counted({3, n / 3 + 1}, contiguous(2), -1, {10, 16});
    this->expect_counted({n / 7 + 1, 7}, placement, -1, {7, 12});
    this->expect_counted({2, n}, contiguous(2), 0, {10, 16});
    if (this->HasFatalFailure()) return;
  }
}

// The kernels of every instruction set, called directly.
using Sets = const cpu::Kernels* const*;

TEST(ObserveKernels, ChannelsInRowsWithEveryInstructionSet) {
  Random random(62);
  for (int trial = 0; trial < 400; ++trial) {
    const int64_t n = between(1, trial % 4 == 0 ? 400 : 70, random);
    const int64_t channels = between(1, 40, random), stride = n + between(0, 1, random) * 5;
    const Values x = sample(pick(kKinds, random), channels * stride, random);
    std::vector<int32_t> low(channels + cpu::kChannelsAtOnce), high(low.size()), zeros(low.size());
    for (Sets set = cpu::runnable_kernels(); *set != nullptr; ++set) {
      SCOPED_TRACE((*set)->name);
      std::fill(low.begin(), low.end(), INT32_MAX);
      std::fill(high.begin(), high.end(), INT32_MIN);
      std::fill(zeros.begin(), zeros.end(), 7);
      (*set)->accumulate.summarize_channels(x.data(), stride, n, channels,
                                            {low.data(), high.data(), zeros.data()});
      for (int64_t c = 0; c < channels; ++c) {
        int32_t least = INT32_MAX, most = INT32_MIN, zero = 7;
        for (int64_t i = c * stride; i < c * stride + n; ++i) {
          least = std::min(least, core::key_of(x[i]));
          most = std::max(most, core::key_of(x[i]));
          zero += x[i] == 0 ? 1 : 0;
        }
        ASSERT_EQ(low[c], least) << n << " values, channel " << c;
        ASSERT_EQ(high[c], most) << n << " values, channel " << c;
        ASSERT_EQ(zeros[c], zero) << n << " values, channel " << c;
      }
    }
  }
}

TEST(ObserveKernels, ExtremaOfManyChannelsWithEveryInstructionSet) {
  Random random(63);
  for (int trial = 0; trial < 300; ++trial) {
    const int64_t channels = between(1, 50, random);
    const Kind kind = pick(kKinds, random), old_kind = pick(kKinds, random);
    std::vector<int32_t> low, high, zeros;
    std::vector<Values> seen(channels);
    Memory start(channels, kExtremaOnly);
    for (int64_t c = 0; c < channels; ++c) {
      Values before, now;
      for (const float x : sample(old_kind, between(0, 2, random), random))
        if (std::isfinite(x)) before.push_back(x);
      for (const float x : sample(kind, 2, random)) now.push_back(std::isfinite(x) ? x : -0.0f);
      const auto state = statistic_plain::observe(before, kExtremaOnly);
      start.channel(c).extrema[0] = state.min;
      start.channel(c).extrema[1] = state.max;
      std::copy(state.tally.begin(), state.tally.end(), start.channel(c).tally);
      low.push_back(std::min(core::key_of(now[0]), core::key_of(now[1])));
      high.push_back(std::max(core::key_of(now[0]), core::key_of(now[1])));
      zeros.push_back((now[0] == 0 ? 1 : 0) + (now[1] == 0 ? 1 : 0));
      seen[c] = before;
      seen[c].insert(seen[c].end(), now.begin(), now.end());
    }
    for (Sets set = cpu::runnable_kernels(); *set != nullptr; ++set) {
      SCOPED_TRACE((*set)->name);
      Memory memory = start;
      const int64_t done =
          (*set)->accumulate.extend_channels({low.data(), high.data(), zeros.data()}, channels, 2,
                                             memory.channel(0).extrema, memory.channel(0).tally);
      ASSERT_GT(done, channels - cpu::kChannelsAtOnce);
      for (int64_t c = 0; c < done; ++c) ASSERT_TRUE(counts_values(memory, c, seen[c]));
    }
  }
}

TEST(ObserveKernels, ZerosOf16BitTypesWithEveryInstructionSet) {
  Random random(64);
  for (int trial = 0; trial < 300; ++trial) {
    const int64_t n = between(0, 1100, random);
    std::vector<uint16_t> x(n), kept;
    for (uint16_t& pattern : x)
      pattern = random() % 3 == 0 ? (random() % 2) << 15 : static_cast<uint16_t>(random());
    for (const uint16_t pattern : x)
      if ((pattern & 0x7fff) != 0) kept.push_back(pattern);
    const auto left = static_cast<int64_t>(kept.size());
    for (Sets set = cpu::runnable_kernels(); *set != nullptr; ++set) {
      SCOPED_TRACE((*set)->name);
      std::vector<uint16_t> out(n + cpu::kIndexPadding);
      ASSERT_EQ((*set)->accumulate.count_zeros(x.data(), n), n - left);
      ASSERT_EQ((*set)->accumulate.drop_zeros(x.data(), n, out.data()), left);
      ASSERT_TRUE(std::equal(kept.begin(), kept.end(), out.begin()));
      std::copy(x.begin(), x.end(), out.begin());  // in place
      ASSERT_EQ((*set)->accumulate.drop_zeros(out.data(), n, out.data()), left);
      ASSERT_TRUE(std::equal(kept.begin(), kept.end(), out.begin()));
    }
  }
}

template <class T, class Kernel>
void expect_extrema(Kernel kernel, Random& random) {
  const int64_t n = between(1, cpu::kGroup, random);
  std::vector<T> x(n);
  const bool any = random() % 4 == 0;  // infinity and NaN too
  bool finite = true;
  float least = INFINITY, most = -INFINITY;
  int32_t zeros = 0;
  for (T& element : x) {
    element.bits = static_cast<uint16_t>(random());
    if (random() % 5 == 0) element.bits &= 0x8000;
    if (!any && !std::isfinite(arrays::counted(element))) element.bits = 0x8001;
    const float value = arrays::counted(element);
    finite = finite && std::isfinite(value);
    least = std::min(least, value);
    most = std::max(most, value);
    zeros += value == 0 ? 1 : 0;
  }
  const cpu::GroupSummary s = kernel(x.data(), n);
  ASSERT_EQ(s.finite(), finite) << n << " values";
  if (!finite) return;
  ASSERT_EQ(core::float_of_key(s.min_key), least) << n << " values";
  ASSERT_EQ(core::float_of_key(s.max_key), most) << n << " values";
  ASSERT_EQ(s.zeros, zeros) << n << " values";
}

TEST(ObserveKernels, ExtremaOf16BitTypesWithEveryInstructionSet) {
  Random random(65);
  for (int trial = 0; trial < 300; ++trial) {
    for (Sets set = cpu::runnable_kernels(); *set != nullptr; ++set) {
      SCOPED_TRACE((*set)->name);
      expect_extrema<core::half>((*set)->accumulate.summarize_f16, random);
      expect_extrema<core::bfloat16>((*set)->accumulate.summarize_bf16, random);
      if (HasFatalFailure()) return;
    }
  }
}

// Counters of 8 bits overflow, in one table, in both or in none, and are all zero when emptied.
TEST(ObserveKernels, CountersWithEveryInstructionSet) {
  Random random(66);
  constexpr int64_t kBins = 4 * cpu::kDrained, kSpreads[] = {1, 2, 5, kBins};
  std::vector<uint8_t> even(kBins), odd(kBins), carried(kBins / cpu::kDrained);
  std::vector<uint32_t> carry(kBins);
  const cpu::NarrowTables tables = {even.data(), odd.data(), carry.data(), carried.data()};
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<uint16_t> index(between(0, 3000, random));
    const int64_t spread = pick(kSpreads, random), run = between(1, 40, random);
    for (size_t i = 0; i < index.size(); ++i)
      index[i] = i % run != 0 ? index[i - 1]
                              : static_cast<uint16_t>(between(0, spread - 1, random) * 37 % kBins);
    std::vector<int64_t> want(kBins, 5);
    for (const uint16_t bin : index) want[bin] += 1;
    const auto total = static_cast<int64_t>(index.size());
    for (Sets set = cpu::runnable_kernels(); *set != nullptr; ++set) {
      SCOPED_TRACE((*set)->name);
      const cpu::AccumulateKernels& k = (*set)->accumulate;
      std::vector<int64_t> counts(kBins, 5), wide(kBins, 5);
      k.count_wide(index.data(), total, wide.data());
      ASSERT_EQ(wide, want);
      for (int64_t* const into : {counts.data(), static_cast<int64_t*>(nullptr)}) {
        k.count(index.data(), total, tables);
        ASSERT_EQ(k.any(tables, kBins), total != 0);
        ASSERT_EQ(k.drain(tables, kBins, into), total);
        ASSERT_FALSE(k.any(tables, kBins));
        const auto empty = [](auto x) { return x == 0; };
        ASSERT_TRUE(std::ranges::all_of(even, empty) && std::ranges::all_of(odd, empty));
        ASSERT_TRUE(std::ranges::all_of(carry, empty) && std::ranges::all_of(carried, empty));
      }
      ASSERT_EQ(counts, want);
    }
  }
}

}  // namespace
