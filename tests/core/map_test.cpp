#include "cpu/map.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "map_values.h"
#include "parallel_threads.h"
#include "unit_grid_plain.h"

namespace {

using namespace mapped;

template <typename T>
class MapTyped : public testing::Test {};
TYPED_TEST_SUITE(MapTyped, Types);

// Every kind of row: around the widths of registers (2 to 16 elements) and of groups (8 and 16),
// across mask bytes and blocks, with fewer and more channels than a register and than a tile (1024)
// hold.
const ChannelLayout kLayouts[] = {
    {1, 1, 1},    {1, 1, 7},    {1, 1, 8},    {1, 1, 1023}, {1, 1, 1024},  {1, 1, 1025},
    {1, 1, 5000}, {3, 1, 700},  {1, 3, 1},    {900, 3, 1},  {700, 8, 1},   {3, 1024, 1},
    {2, 1025, 1}, {2, 2500, 1}, {800, 3, 2},  {50, 16, 9},  {1, 300, 9},   {7, 20, 49},
    {2, 70, 49},  {1, 100, 63}, {3, 5, 64},   {2, 9, 65},   {2, 8, 196},   {2, 3, 1025},
    {1, 5, 1024}, {11, 1, 1},   {1, 4096, 1}, {1, 1025, 2}, {90, 2, 1},    {70, 4, 1},
    {70, 7, 1},   {70, 15, 1},  {9, 16, 1},   {9, 17, 1},   {9, 32, 1},    {9, 33, 1},
    {3, 50, 2},   {3, 50, 3},   {3, 50, 4},   {3, 50, 5},   {3, 50, 7},    {3, 50, 8},
    {3, 50, 15},  {3, 50, 16},  {3, 50, 17},  {3, 50, 31},  {3, 50, 32},   {3, 50, 33},
    {2, 1023, 3}, {2, 1024, 3}, {2, 1025, 3}, {1, 1039, 5}, {1, 1041, 17}, {1, 2100, 9},
    {5, 1025, 1}};

TYPED_TEST(MapTyped, EveryInstructionSetEqualsTheReferenceForEveryLayout) {
  using T = TypeParam;
  const int dtype = static_cast<int>(kDType<T>);
  for (const ChannelLayout& layout : kLayouts) {
    const std::vector<T> x = values<T>(layout.numel());
    const QParamsOf q = qparams_of(layout.channels);
    for (const Rounding rounding : kRoundings)
      for (const Mask mask : kMasks)
        for (auto set = cpu::runnable_kernels(); *set != nullptr; ++set) {
          const std::string where =
              std::string((*set)->name) + " [" + std::to_string(layout.outer) + "," +
              std::to_string(layout.channels) + "," + std::to_string(layout.inner) + "]";
          const int64_t n = layout.numel();
          Output<T> y(n), unmasked(n);
          MapTask task{x.data(),       y.out.data(),        y.mask.data(), layout,
                       q.scale.data(), q.zero_point.data(), {-128, 127},   rounding,
                       mask,           kFakeQuant,          false};
          (*set)->map.forward[dtype](task, 0, n);
          expect_reference(x, y, layout, q, rounding, mask, where);
          if (testing::Test::HasFatalFailure()) return;
          task.out = unmasked.out.data();
          task.mask = nullptr;
          task.stream = true;
          (*set)->map.forward[dtype](task, 0, n);
          ASSERT_EQ(std::memcmp(y.out.data(), unmasked.out.data(), y.out.size() * sizeof(T)), 0)
              << where << " without a mask, streamed";
        }
  }
}

TYPED_TEST(MapTyped, ResultsDoNotDependOnTheNumberOfThreads) {
  using T = TypeParam;
  const int64_t threads = cpu::test_threads();
  const ChannelLayout layouts[] = {{1, 1, 200001}, {9, 31, 700},  {40, 100, 49}, {70000, 3, 1},
                                   {100, 2000, 1}, {33, 1024, 3}, {33, 1025, 3}, {4, 9000, 3},
                                   {3, 9000, 3},   {1, 9001, 9},  {4, 1, 30000}, {3, 40000, 1},
                                   {4, 40000, 1}};
  for (const ChannelLayout& layout : layouts) {
    const int64_t n = layout.numel();
    const std::vector<T> x = values<T>(n);
    const QParamsOf q = qparams_of(layout.channels);
    Output<T> single(n), dx_single(n);
    for (const int64_t count : {1, 2, 3, 7}) {
      cpu::test_threads() = count;
      Output<T> y(n), dx(n);
      cpu::fake_quant_forward(kDType<T>, {x.data(),
                                          y.out.data(),
                                          y.mask.data(),
                                          layout,
                                          q.scale.data(),
                                          q.zero_point.data(),
                                          {-128, 127},
                                          Rounding::half_even,
                                          Mask::rounded});
      cpu::fake_quant_backward(kDType<T>, x.data(), y.mask.data(), dx.out.data(), n);
      if (count == 1) {
        single = y;
        dx_single = dx;
      }
      ASSERT_EQ(std::memcmp(y.out.data(), single.out.data(), y.out.size() * sizeof(T)), 0) << count;
      ASSERT_EQ(y.mask, single.mask) << count;
      ASSERT_EQ(std::memcmp(dx.out.data(), dx_single.out.data(), dx.out.size() * sizeof(T)), 0);
      ASSERT_TRUE(y.guards_hold(n));
    }
    cpu::test_threads() = threads;
    expect_reference(x, single, layout, q, Rounding::half_even, Mask::rounded, "threads");
    if (testing::Test::HasFatalFailure()) return;
  }
}

// Gradients are copied bit by bit, NaN and infinity too; elsewhere it is +0.
TYPED_TEST(MapTyped, BackwardPassesTheGradientWhereTheBitIsSet) {
  using T = TypeParam;
  const int dtype = static_cast<int>(kDType<T>);
  for (const int64_t n : {1, 7, 8, 9, 64, 1023, 1024, 1025, 3001}) {
    const std::vector<T> grad = values<T>(n);
    std::mt19937 random(9);
    std::vector<uint8_t> mask((n + 7) / 8);
    for (uint8_t& byte : mask) byte = static_cast<uint8_t>(random());
    for (int i = 0; i < 2 * count_of_sets(); ++i) {
      const cpu::Kernels* const* set = cpu::runnable_kernels() + i / 2;
      Output<T> dx(n);
      const bool stream = i % 2 == 1;
      (*set)->map.backward[dtype](grad.data(), mask.data(), dx.out.data(), 0, n, stream);
      const T zero{};
      for (int64_t i = 0; i < n; ++i)
        ASSERT_EQ(std::memcmp(&dx.out[i], bit(mask, i) ? &grad[i] : &zero, sizeof(T)), 0)
            << (*set)->name << " " << i << " of " << n;
      for (int64_t i = n; i < n + 64; ++i) {
        T guard;
        std::memset(static_cast<void*>(&guard), kGuard, sizeof guard);
        ASSERT_EQ(std::memcmp(&dx.out[i], &guard, sizeof(T)), 0);
      }
    }
  }
}

TYPED_TEST(MapTyped, NothingIsTouchedWhereThereAreNoElements) {
  using T = TypeParam;
  Output<T> y(0);
  const std::vector<T> x(1);
  for (const ChannelLayout& layout : {ChannelLayout{0, 3, 4}, {2, 0, 4}, {2, 3, 0}})
    cpu::fake_quant_forward(kDType<T>, {x.data(),
                                        y.out.data(),
                                        y.mask.data(),
                                        layout,
                                        nullptr,
                                        nullptr,
                                        {-128, 127},
                                        Rounding::half_even,
                                        Mask::rounded});
  cpu::fake_quant_backward(kDType<T>, x.data(), y.mask.data(), y.out.data(), 0);
  EXPECT_TRUE(y.guards_hold(0));
}

TYPED_TEST(MapTyped, AnInvalidScaleGivesNanInItsChannelOnly) {
  using T = TypeParam;
  const float scale[] = {0.1f, 0.0f, -1.0f, INFINITY, NAN};
  const int32_t zero_point[] = {0, 0, 0, 0, 0};
  for (const int64_t inner : {1, 20, 100}) {
    const ChannelLayout layout{30, 5, inner};
    const int64_t n = layout.numel();
    const std::vector<T> x(n);
    Output<T> y(n);
    cpu::fake_quant_forward(kDType<T>, {x.data(),
                                        y.out.data(),
                                        y.mask.data(),
                                        layout,
                                        scale,
                                        zero_point,
                                        {-128, 127},
                                        Rounding::half_even,
                                        Mask::rounded});
    for (int64_t i = 0; i < n; ++i) {
      ASSERT_EQ(std::isnan(value_of(y.out[i])), i / inner % 5 != 0) << i;
      ASSERT_EQ(bit(y.mask, i), i / inner % 5 == 0) << i;
    }
  }
}

template <typename T, size_t n>
std::vector<uint8_t> mask_of(const T (&x)[n], Mask kind) {
  Output<T> y(n);
  const float scale = 1;
  const int32_t zero_point = 0;
  cpu::fake_quant_forward(kDType<T>, {x,
                                      y.out.data(),
                                      y.mask.data(),
                                      {1, 1, n},
                                      &scale,
                                      &zero_point,
                                      {-128, 127},
                                      Rounding::half_even,
                                      kind});
  return {y.mask.begin(), y.mask.begin() + (n + 7) / 8};
}

// Element i is bit i % 8 of byte i / 8, the unused bits are 0.
TEST(Map, MaskLayout) {
  const float x[] = {-200, -128.4f, -1.5f,  -0.5f,  0.2f,   0.5f,
                     1.5f, 2.5f,    126.6f, 127.4f, 127.6f, 300};
  EXPECT_EQ(mask_of(x, Mask::rounded), (std::vector<uint8_t>{0xfe, 0x03}));
  EXPECT_EQ(mask_of(x, Mask::paper), (std::vector<uint8_t>{0xfc, 0x01}));
  const double zero[] = {0.0};
  EXPECT_EQ(mask_of(zero, Mask::rounded), (std::vector<uint8_t>{0x01}));
}

// All 2^16 inputs of a 16-bit type.
template <typename T>
void exhaust(plain::Format format) {
  std::vector<T> x(1 << 16);
  for (int i = 0; i < 1 << 16; ++i) x[i].bits = static_cast<uint16_t>(i);
  const plain::Params params[] = {
      {1, 0, -128, 127},           {0.1f, 0, -127, 127},        {0.0115294f, 3, -128, 127},
      {0x1p-24f, 1, -128, 127},    {0x1p-126f, -7, -8, 7},      {511.97f, 0, -128, 127},
      {700, -128, -128, 127},      {1e36f, 0, -128, 127},       {0.75f, 85, 0, 255},
      {3e-5f, 32768, 0, 65535},    {1.9999f, 0, -32768, 32767}, {0x1.fffffep120f, 0, -128, 127},
      {0x1.fffffep127f, 0, 0, 255}};
  std::vector<float> value(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    value[i] = static_cast<float>(plain::decode(x[i].bits, format));
  for (const plain::Params& p : params)
    for (const Rounding rounding : kRoundings)
      for (const Mask mask : kMasks) {
        std::vector<Output<T>> outputs;
        for (auto set = cpu::runnable_kernels(); *set != nullptr; ++set) {
          outputs.emplace_back(1 << 16);
          const MapTask task{x.data(),
                             outputs.back().out.data(),
                             outputs.back().mask.data(),
                             {1, 1, 1 << 16},
                             &p.scale,
                             &p.zero_point,
                             {p.quant_min, p.quant_max},
                             rounding,
                             mask,
                             kFakeQuant,
                             false};
          (*set)->map.forward[static_cast<int>(kDType<T>)](task, 0, 1 << 16);
        }
        for (int i = 0; i < 1 << 16; ++i) {
          const plain::Mapped want = plain::fake_quant(value[i], p, rounding, mask);
          const uint16_t bits = plain::encode(want.value + 0.0f, format);
          for (const Output<T>& y : outputs) {
            ASSERT_EQ(y.out[i].bits, bits) << value[i] << " scale " << p.scale;
            ASSERT_EQ(bit(y.mask, i), want.passes) << value[i] << " scale " << p.scale;
          }
          // No finite input gives an infinite output, whatever the scale.
          const bool finite = std::isfinite(static_cast<float>(plain::decode(bits, format)));
          ASSERT_TRUE(finite || std::isnan(value[i]));
        }
      }
}

TEST(Map, EveryHalfEqualsTheReference) { exhaust<half>(plain::kHalf); }
TEST(Map, EveryBfloat16EqualsTheReference) { exhaust<bfloat16>(plain::kBfloat16); }

TEST(Map, HostileFloatsEqualTheReferenceOnEveryInstructionSet) {
  const plain::Params params[] = {{0.1f, 3, -128, 127},
                                  {0x1p-126f, 0, -128, 127},
                                  {0x1.fffffep120f, 0, -128, 127},
                                  {3e-5f, 32768, 0, 65535},
                                  {1 / 3.0f, -1, -8, 7}};
  for (const plain::Params& p : params) {
    const std::vector<float> x = plain::hostile_floats(p);
    const int64_t n = static_cast<int64_t>(x.size());
    for (const Rounding rounding : kRoundings)
      for (const Mask mask : kMasks)
        for (auto set = cpu::runnable_kernels(); *set != nullptr; ++set) {
          Output<float> y(n);
          const MapTask task{x.data(),
                             y.out.data(),
                             y.mask.data(),
                             {1, 1, n},
                             &p.scale,
                             &p.zero_point,
                             {p.quant_min, p.quant_max},
                             rounding,
                             mask,
                             kFakeQuant,
                             false};
          (*set)->map.forward[0](task, 0, n);
          for (int64_t i = 0; i < n; ++i) {
            const plain::Mapped want = plain::fake_quant(x[i], p, rounding, mask);
            if (std::isnan(x[i])) {
              ASSERT_TRUE(std::isnan(y.out[i]));
            } else {
              ASSERT_TRUE(same(y.out[i], want.value + 0.0f)) << (*set)->name << " " << x[i];
              ASSERT_TRUE(std::isfinite(y.out[i]));
            }
            ASSERT_EQ(bit(y.mask, i), want.passes) << (*set)->name << " " << x[i];
          }
        }
  }
}

}  // namespace
