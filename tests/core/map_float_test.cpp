#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "float_format_plain.h"
#include "map_values.h"
#include "parallel_threads.h"

// Element-wise fake-quant on float formats.
namespace {

using namespace mapped;
using float_plain::Format;
using float_plain::kFormats;

template <typename T>
class MapFloats : public testing::Test {};
TYPED_TEST_SUITE(MapFloats, Types);

const ChannelLayout kLayouts[] = {{1, 1, 1},    {1, 1, 1025}, {1, 1, 5000}, {3, 1024, 1},
                                  {2, 1025, 1}, {800, 3, 2},  {50, 16, 9},  {7, 20, 49},
                                  {2, 9, 65},   {9, 17, 1}};

core::Codes codes_of(const Format& f) {
  const core::FloatFormat& format = core::format_named(f.name)->format;
  const int32_t end = static_cast<int32_t>(format.largest);
  return {-end, end, format};
}

std::vector<float> scales_of(int64_t channels) {
  std::vector<float> scale;
  for (int64_t c = 0; c < channels; ++c)
    scale.push_back(0.01f + 0.003f * static_cast<float>(c % 101));
  return scale;
}

// Values over the whole of a format and beyond both of its ends, ties among them.
template <typename T>
std::vector<T> values_on(const Format& f, const ChannelLayout& layout, const float* scale) {
  std::vector<T> x = values<T>(layout.numel());
  std::mt19937 random(7);
  for (int64_t i = 0; i < layout.numel(); ++i) {
    if (i % 5 == 0) continue;
    const int at = static_cast<int>(random() % f.numbers);
    const long double low = float_plain::decode(f, at), high = float_plain::decode(f, at + 1);
    const int quarter = static_cast<int>(random() % 5);
    const float sign = random() % 2 == 0 ? 1.0f : -1.0f;
    const float v = static_cast<float>(low + (high - low) * quarter / 4) *
                    scale[i / layout.inner % layout.channels] * sign;
    if constexpr (std::is_same_v<T, half>)
      x[i] = {plain::encode(v, plain::kHalf)};
    else if constexpr (std::is_same_v<T, bfloat16>)
      x[i] = {plain::encode(v, plain::kBfloat16)};
    else
      x[i] = static_cast<T>(v);
  }
  return x;
}

template <typename T>
void expect_nearest(const Format& f, const std::vector<T>& x, const Output<T>& y,
                    const ChannelLayout& layout, const std::vector<float>& scale, Mask mask,
                    const std::string& where) {
  for (int64_t i = 0; i < layout.numel(); ++i) {
    const float s = scale[i / layout.inner % layout.channels];
    const std::string at = where + " " + f.name + " element " + std::to_string(i);
    if constexpr (std::is_same_v<T, double>) {
      const auto want = float_plain::fake_quant(f, x[i], s);
      ASSERT_TRUE(float_plain::same(y.out[i], want.value)) << at;
      ASSERT_EQ(bit(y.mask, i), mask == Mask::rounded ? want.rounded : want.paper) << at;
    } else {
      const auto want = float_plain::fake_quant(f, value_of(x[i]), s);
      if (std::isnan(want.value)) {
        ASSERT_TRUE(std::isnan(value_of(y.out[i]))) << at;
      } else {
        ASSERT_TRUE(same(y.out[i], want.value)) << at << " of " << value_of(x[i]);
      }
      ASSERT_EQ(bit(y.mask, i), mask == Mask::rounded ? want.rounded : want.paper) << at;
    }
  }
  ASSERT_TRUE(y.guards_hold(layout.numel())) << where;
}

TYPED_TEST(MapFloats, EveryInstructionSetRoundsToTheNearestNumber) {
  using T = TypeParam;
  const int dtype = static_cast<int>(kDType<T>);
  for (const Format& f : kFormats)
    for (const ChannelLayout& layout : kLayouts) {
      const int64_t n = layout.numel();
      const std::vector<float> scale = scales_of(layout.channels);
      const std::vector<int32_t> zero_point(layout.channels);
      const std::vector<T> x = values_on<T>(f, layout, scale.data());
      for (const Mask mask : kMasks)
        for (auto set = cpu::runnable_kernels(); *set != nullptr; ++set) {
          Output<T> y(n), unmasked(n);
          MapTask task{x.data(),     y.out.data(),      y.mask.data(), layout,
                       scale.data(), zero_point.data(), codes_of(f),   Rounding::half_even,
                       mask,         kFakeQuant,        false};
          (*set)->map.forward[dtype](task, 0, n);
          expect_nearest(f, x, y, layout, scale, mask, (*set)->name);
          if (testing::Test::HasFatalFailure()) return;
          task.out = unmasked.out.data();
          task.mask = nullptr;
          task.zero_point = nullptr;
          task.stream = true;
          (*set)->map.forward[dtype](task, 0, n);
          ASSERT_EQ(std::memcmp(y.out.data(), unmasked.out.data(), y.out.size() * sizeof(T)), 0)
              << (*set)->name << " " << f.name << " without a mask, streamed";
        }
    }
}

TYPED_TEST(MapFloats, ResultsDoNotDependOnTheNumberOfThreads) {
  using T = TypeParam;
  const int64_t threads = cpu::test_threads();
  const Format& f = kFormats[1];
  for (const ChannelLayout& layout : {ChannelLayout{1, 1, 200001}, {40, 100, 49}, {3, 40000, 1}}) {
    const int64_t n = layout.numel();
    const std::vector<float> scale = scales_of(layout.channels);
    const std::vector<T> x = values_on<T>(f, layout, scale.data());
    Output<T> single(n);
    for (const int64_t count : {1, 2, 7}) {
      cpu::test_threads() = count;
      Output<T> y(n);
      cpu::fake_quant_forward(kDType<T>,
                              {x.data(), y.out.data(), y.mask.data(), layout, scale.data(), nullptr,
                               codes_of(f), Rounding::half_even, Mask::rounded});
      if (count == 1) single = y;
      ASSERT_EQ(std::memcmp(y.out.data(), single.out.data(), y.out.size() * sizeof(T)), 0) << count;
      ASSERT_EQ(y.mask, single.mask) << count;
    }
    cpu::test_threads() = threads;
    expect_nearest(f, x, single, layout, scale, Mask::rounded, "threads");
    if (testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace
