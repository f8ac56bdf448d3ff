#include <gtest/gtest.h>

#include <vector>

#include "arrays.h"
#include "machines.h"
#include "statistic_plain.h"

// The kernels of accumulate.cu, run on the host, against the definition of a statistic.
namespace {

using namespace torch_ext;
using arrays::contiguous;
using arrays::make_array;
using core::HistogramLayout;
using gpu::emulation::machine;
using machines::kMachines;
using statistic_plain::all_count;
using statistic_plain::between;
using statistic_plain::counts_values;
using statistic_plain::Kind;
using statistic_plain::kKinds;
using statistic_plain::kLayouts;
using statistic_plain::Memory;
using statistic_plain::pick;
using statistic_plain::Random;
using statistic_plain::Values;

HistogramLayout any_layout(Random& random) {
  return random() % 5 == 0 ? HistogramLayout{0, 0} : pick(kLayouts, random);
}

// Uninitialised memory, as that of a fresh statistic.
void fill_with_garbage(Memory& memory) {
  const core::Statistic raw = memory.raw();
  std::memset(raw.extrema, 0x5b, raw.channels * 8);
  std::memset(raw.tally, 0x5b, raw.channels * 40);
  if (raw.counts != nullptr) std::memset(raw.counts, 0x5b, raw.channels * raw.layout.size() * 8);
}

template <class T>
class Accumulate : public testing::Test {};
using Types = testing::Types<float, double, core::half, core::bfloat16>;
TYPED_TEST_SUITE(Accumulate, Types);

TYPED_TEST(Accumulate, CountsEveryLayoutOfATensor) {
  Random random(1);
  for (int trial = 0; trial < 40; ++trial) {
    machine() = pick(kMachines, random);
    machine().seed = trial;
    SCOPED_TRACE(machines::text(machine()));
    auto sizes = arrays::random_sizes(trial % 4 == 0 ? 20000 : 600, random);
    if (sizes.empty()) sizes = {7};
    const int axis = static_cast<int>(between(-1, static_cast<int64_t>(sizes.size()) - 1, random));
    if (axis >= 0) sizes[axis] = std::min<int64_t>(sizes[axis], 40);
    const int64_t channels = axis < 0 ? 1 : sizes[axis];
    Memory memory(channels, any_layout(random));
    std::vector<Values> seen(channels);
    const bool fresh = random() % 2 == 0;
    if (fresh) fill_with_garbage(memory);
    for (int64_t batch = 0; batch < between(1, 3, random); ++batch) {
      const auto placement = arrays::random_placement(sizes.size(), random);
      const auto x = make_array<TypeParam>(sizes, placement, pick(kKinds, random), random);
      machines::observe(x.view(), axis, memory.raw(), {fresh && batch == 0, nullptr});
      x.append_to(seen, axis);
      ASSERT_TRUE(all_count(memory, seen));
    }
    if (fresh && seen[0].empty() && channels > 0) continue;
  }
}

struct Case {
  std::vector<int64_t> sizes;
  std::vector<int> order;  // innermost first
  int axis;
};
// Large enough that blocks share a channel, and no size is a multiple of a block's: rows, columns,
// images with the channels in the middle and innermost.
const Case kShared[] = {{{261007}, {0}, -1},
                        {{331, 797}, {0, 1}, -1},
                        {{3, 87001}, {1, 0}, 0},
                        {{87001, 3}, {1, 0}, 1},
                        {{14503, 18}, {1, 0}, 1},
                        {{5, 2, 26003}, {1, 2, 0}, 1},
                        {{4, 2, 32768}, {2, 1, 0}, 1},
                        {{2, 40, 57, 31}, {1, 3, 2, 0}, 1},
                        {{40}, {0}, 0}};

TYPED_TEST(Accumulate, BlocksThatShareAChannelAgree) {
  Random random(2);
  for (const Case& c : kShared) {
    auto placement = contiguous(c.sizes.size());
    placement.order = c.order;
    const int64_t channels = c.axis < 0 ? 1 : c.sizes[c.axis];
    const Kind kind = pick({Kind::two_scales, Kind::any_bits, Kind::relu, Kind::wide}, random);
    const auto x = make_array<TypeParam>(c.sizes, placement, kind, random);
    const auto y = make_array<TypeParam>(c.sizes, placement, Kind::gauss, random);
    std::vector<Values> seen(channels);
    x.append_to(seen, c.axis);
    for (const HistogramLayout layout : {HistogramLayout{8, 7}, {0, 0}}) {
      machine() = pick(kMachines, random);
      machine().seed = random();
      SCOPED_TRACE(machines::text(machine()) + ", sizes[0] " + std::to_string(c.sizes[0]));
      Memory fresh(channels, layout), begun(channels, layout);
      fill_with_garbage(fresh);
      machines::observe(x.view(), c.axis, fresh.raw(), {true, nullptr});
      ASSERT_TRUE(all_count(fresh, seen));
      machines::observe(y.view(), c.axis, begun.raw());
      machines::observe(x.view(), c.axis, begun.raw());
      std::vector<Values> both = seen;
      y.append_to(both, c.axis);
      ASSERT_TRUE(all_count(begun, both));
    }
  }
}

// Batches whose magnitude rises, with rises inside a batch too: windows move in blocks and in the
// statistic, at different times.
TEST(AccumulateGrowth, AnySchedule) {
  Random random(3);
  const std::vector<double> schedules[] = {
      {1e-20, 1e20}, {1e6, 1, 1e-6, 1e7}, {1e-44, 1e-39, 1e-37, 1e-36}, {0, 1e-45, 0, 3e37}};
  for (const auto& scales : schedules) {
    for (const auto& [layout, n] :
         {std::pair<HistogramLayout, int64_t>{{10, 16}, 70001}, {{5, 4}, 70001}, {{7, 12}, 999}}) {
      machine() = pick(kMachines, random);
      machine().seed = random();
      SCOPED_TRACE(machines::text(machine()));
      Memory memory(1, layout);
      Values seen;
      for (const double scale : scales) {
        Values batch = statistic_plain::sample(Kind::gauss, n, random);
        for (int64_t i = 0; i < n; ++i)
          batch[i] = static_cast<float>(batch[i] * scale * (i > n / 2 ? 1 : 1e-5));
        const int64_t stride = 1;
        machines::observe({batch.data(), core::DType::f32, 1, &n, &stride}, -1, memory.raw());
        seen.insert(seen.end(), batch.begin(), batch.end());
        ASSERT_TRUE(counts_values(memory, 0, seen)) << "at scale " << scale;
      }
    }
  }
}

// 16-bit counters carry: one, two or three distinct values, each far more often than 65536 times.
TEST(AccumulateCarry, EqualValues) {
  const int64_t n = 1 << 19, stride = 1;
  Random random(4);
  for (const int distinct : {1, 2, 3}) {
    Values values(n);
    for (int64_t i = 0; i < n; ++i) values[i] = 1.0f + static_cast<float>(random() % distinct);
    for (const auto& m : {machines::kMachines[1], machines::kMachines[4]}) {
      machine() = m;
      machine().processors = 2;
      Memory memory(1, {10, 16});
      machines::observe({values.data(), core::DType::f32, 1, &n, &stride}, -1, memory.raw());
      ASSERT_TRUE(counts_values(memory, 0, values)) << distinct;
    }
  }
}

// Views that are not aligned to 16 bytes, of all lengths around a packet and a block.
TYPED_TEST(Accumulate, AnyOffsetAndLength) {
  Random random(5);
  machine() = kMachines[0];
  const auto x = make_array<TypeParam>({9000}, contiguous(1), Kind::gauss, random);
  for (const int64_t length : {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 511, 513, 2047, 2049, 8193}) {
    for (const int64_t offset : {0, 1, 3}) {
      Memory memory(1, {5, 4});
      const int64_t stride = 1;
      const core::TensorView view{x.storage.data() + offset, arrays::kDType<TypeParam>, 1, &length,
                                  &stride};
      machines::observe(view, -1, memory.raw());
      Values seen;
      for (int64_t i = 0; i < length; ++i) seen.push_back(arrays::counted(x.storage[offset + i]));
      ASSERT_TRUE(counts_values(memory, 0, seen)) << offset << " + " << length;
    }
  }
}

TEST(AccumulateMode, NothingHappensWhereTheFlagIsSet) {
  machine() = kMachines[0];
  const Values values(100000, 2.0f);
  const int64_t n = 100000, stride = 1;
  for (const uint8_t flag : {0, 1}) {
    Memory memory(1, {10, 16}), before(1, {10, 16});
    machines::observe({values.data(), core::DType::f32, 1, &n, &stride}, -1, memory.raw(),
                      {false, &flag});
    EXPECT_EQ(memory == before, flag != 0);
  }
}

TEST(AccumulateMode, OneLaunch) {
  machine() = kMachines[0];
  const Values values(200000, 2.0f);
  const int64_t n = 200000, stride = 1;
  Memory memory(1, {10, 16});
  const int64_t before = gpu::emulation::launches();
  machines::observe({values.data(), core::DType::f32, 1, &n, &stride}, -1, memory.raw(),
                    {true, nullptr});
  EXPECT_EQ(gpu::emulation::launches(), before + 1);
}

}  // namespace
