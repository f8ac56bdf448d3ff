#include <gtest/gtest.h>

#include <vector>

#include "arrays.h"
#include "cpu/driver.h"
#include "parallel_threads.h"

// cpu::observe against counting each value by its definition: every layout, type and thread count.
namespace {

using namespace torch_ext;
using arrays::Array;
using arrays::contiguous;
using arrays::make_array;
using core::HistogramLayout;
using statistic_plain::all_count;
using statistic_plain::between;
using statistic_plain::Kind;
using statistic_plain::kKinds;
using statistic_plain::kLayouts;
using statistic_plain::Memory;
using statistic_plain::pick;
using statistic_plain::Random;
using statistic_plain::Values;

// Extrema alone in one of seven.
HistogramLayout any_layout(Random& random) {
  return random() % 7 == 0 ? HistogramLayout{0, 0} : pick(kLayouts, random);
}

template <class T>
class Observe : public testing::Test {
 protected:
  void TearDown() override { cpu::test_threads() = 2; }
};
using Types = testing::Types<float, double, core::half, core::bfloat16>;
TYPED_TEST_SUITE(Observe, Types);

TYPED_TEST(Observe, CountsEveryLayoutPerTensor) {
  Random random(31);
  for (int trial = 0; trial < 250; ++trial) {
    SCOPED_TRACE(trial);
    cpu::test_threads() = between(1, 8, random);
    Memory memory(1, any_layout(random));
    std::vector<Values> seen(1);
    for (int64_t batch = between(1, 3, random); batch > 0; --batch) {
      const auto sizes = arrays::random_sizes(trial % 8 == 0 ? 20000 : 600, random);
      const auto placement = arrays::random_placement(sizes.size(), random);
      const auto x = make_array<TypeParam>(sizes, placement, pick(kKinds, random), random);
      cpu::observe(x.view(), -1, memory.raw());
      x.append_to(seen, -1);
      ASSERT_TRUE(all_count(memory, seen));
    }
  }
}

TYPED_TEST(Observe, CountsEveryLayoutPerChannel) {
  Random random(32);
  for (int trial = 0; trial < 250; ++trial) {
    SCOPED_TRACE(trial);
    cpu::test_threads() = between(1, 8, random);
    auto sizes = arrays::random_sizes(trial % 8 == 0 ? 20000 : 600, random);
    if (sizes.empty()) sizes = {7};
    const int axis = static_cast<int>(between(0, static_cast<int64_t>(sizes.size()) - 1, random));
    sizes[axis] = std::min<int64_t>(sizes[axis], 40);
    const int64_t channels = sizes[axis];
    Memory memory(channels, any_layout(random));
    std::vector<Values> seen(channels);
    for (int64_t batch = between(1, 2, random); batch > 0; --batch) {
      const auto placement = arrays::random_placement(sizes.size(), random);
      const auto x = make_array<TypeParam>(sizes, placement, pick(kKinds, random), random);
      cpu::observe(x.view(), axis, memory.raw());
      x.append_to(seen, axis);
      ASSERT_TRUE(all_count(memory, seen));
    }
  }
}

// Large enough that threads share a channel. No size is a multiple of a block's.
TYPED_TEST(Observe, ThreadsThatShareAChannelAgree) {
  struct Case {
    std::vector<int64_t> sizes;
    std::vector<int> order;  // innermost first
    int axis;
  };
  const Case cases[] = {{{261007}, {0}, -1},           {{331, 797}, {0, 1}, -1},
                        {{3, 87001}, {1, 0}, 0},       {{87001, 3}, {1, 0}, 1},
                        {{14503, 18}, {1, 0}, 1},      {{5, 2, 26003}, {1, 2, 0}, 1},
                        {{17, 33, 467}, {1, 2, 0}, 1}, {{90, 1501}, {1, 0}, 1}};
  Random random(33);
  for (const Case& c : cases) {
    auto placement = contiguous(c.sizes.size());
    placement.order = c.order;
    const int64_t channels = c.axis < 0 ? 1 : c.sizes[c.axis];
    for (const HistogramLayout layout : {HistogramLayout{8, 7}, {0, 0}}) {
      const Kind kind = random() % 2 == 0 ? Kind::two_scales : Kind::any_bits;
      const auto x = make_array<TypeParam>(c.sizes, placement, kind, random);
      std::vector<Values> seen(channels);
      x.append_to(seen, c.axis);
      for (const int64_t threads : {1, 3, 8}) {
        SCOPED_TRACE(std::to_string(threads) + " threads, " + std::to_string(c.sizes[0]));
        cpu::test_threads() = threads;
        Memory memory(channels, layout);
        cpu::observe(x.view(), c.axis, memory.raw());
        ASSERT_TRUE(all_count(memory, seen));
      }
    }
  }
}

// Every bit pattern of a 16-bit type.
template <class T>
void observe_every_pattern() {
  Array<T> x{{65536}, {1}, std::vector<T>(65536)};
  for (int i = 0; i < 65536; ++i) x.storage[i].bits = static_cast<uint16_t>(i);
  std::vector<Values> seen(1);
  x.append_to(seen, -1);
  for (const HistogramLayout layout : kLayouts) {
    Memory memory(1, layout);
    cpu::observe(x.view(), -1, memory.raw());
    EXPECT_TRUE(all_count(memory, seen));
  }
}

TEST(ObserveTypes, EveryHalfCounts) { observe_every_pattern<core::half>(); }
TEST(ObserveTypes, EveryBfloat16Counts) { observe_every_pattern<core::bfloat16>(); }

TEST(ObserveTypes, DoublesAreRoundedToFloat32First) {
  const double largest = std::numeric_limits<float>::max(), half_over = 0x1p103;
  const double least = 0x1p-149;
  const Array<double> x{{9},
                        {1},
                        {largest, std::nextafter(largest + half_over, 0.0), largest + half_over,
                         -1e300, least, -least / 2, std::nextafter(least / 2, 1.0), 5e-324, -0.0}};
  Memory memory(1, {10, 16});
  cpu::observe(x.view(), -1, memory.raw());
  // Half a unit beyond the largest rounds to infinity; half the least subnormal to zero.
  const int64_t want[] = {7, 3, 2, 2, 0};
  EXPECT_TRUE(std::equal(want, want + 5, memory.tally(0)))
      << statistic_plain::text(memory.tally(0), 5);
  EXPECT_EQ(memory.extrema(0)[0], 0.0f);
  EXPECT_EQ(memory.extrema(0)[1], std::numeric_limits<float>::max());
}

TEST(ObserveTypes, ExtremaOfZerosArePositiveZero) {
  for (const int64_t n : {1, 5000}) {
    const Array<float> x{{n}, {1}, Values(n, -0.0f)};
    Memory memory(1, {10, 16});
    cpu::observe(x.view(), -1, memory.raw());
    EXPECT_FALSE(std::signbit(memory.extrema(0)[0]));
    EXPECT_FALSE(std::signbit(memory.extrema(0)[1]));
    EXPECT_EQ(memory.tally(0)[core::kZeros], n);
  }
}

TEST(ObserveTypes, ExtremaAloneNeedNoHistogram) {
  Random random(34);
  for (const Kind kind : kKinds) {
    for (const int64_t n : {0, 1, 3000, 40000}) {
      for (const int axis : {-1, 0, 1}) {
        const auto x = make_array<float>({2, n}, contiguous(2), kind, random);
        const int64_t channels = axis < 0 ? 1 : x.sizes[axis];
        std::vector<Values> seen(channels);
        x.append_to(seen, axis);
        Memory memory(channels, {0, 0});
        cpu::observe(x.view(), axis, memory.raw());
        EXPECT_TRUE(all_count(memory, seen)) << static_cast<int>(kind) << ", axis " << axis;
      }
    }
  }
}

}  // namespace
