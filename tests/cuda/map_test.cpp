#include "cpu/map.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "arrays.h"
#include "machines.h"

// The kernels of map.cu, run on the host, against the CPU's, which tests/core compares with an
// integer reference.
namespace {

using namespace torch_ext;
using core::ChannelLayout;
using core::FakeQuantJob;
using core::Mask;
using core::Rounding;
using statistic_plain::Random;

constexpr ChannelLayout kLayouts[] = {
    {1, 1, 0}, {1, 1, 1},  {1, 1, 7},    {1, 1, 8},   {1, 1, 9},  {1, 1, 5000}, {3, 5, 8},
    {3, 5, 7}, {4, 33, 1}, {2, 3, 1000}, {1, 700, 3}, {2, 1, 64}, {5, 2, 2},    {1, 40, 2049}};
constexpr unsigned char kGuard = 0x5a;

template <class T>
class Map : public testing::Test {};
using Types = testing::Types<float, double, core::half, core::bfloat16>;
TYPED_TEST_SUITE(Map, Types);

// Values around the grid's ends and on ties, with NaN and infinity among them.
template <class T>
std::vector<T> values(int64_t n, Random& random) {
  std::vector<T> x(n);
  for (T& each : x) {
    float v = static_cast<float>(std::normal_distribution<double>(0, 3)(random));
    const auto draw = random() % 40;
    if (draw < 8) v = static_cast<float>(std::ldexp(std::round(v * 8), -4));
    if (draw == 8) v = INFINITY;
    if (draw == 9) v = -INFINITY;
    if (draw == 10) v = NAN;
    if (draw == 11) v = -0.0f;
    arrays::store(v, each);
  }
  return x;
}

template <class T>
bool same(T a, T b) {
  if (std::memcmp(&a, &b, sizeof(T)) == 0) return true;
  const auto wide_a = core::widen(a), wide_b = core::widen(b);
  return std::isnan(wide_a) && std::isnan(wide_b);
}

template <class T>
struct Output {
  explicit Output(int64_t n) : out(n + 16), mask((n + 7) / 8 + 16, kGuard) {
    std::memset(static_cast<void*>(out.data()), kGuard, out.size() * sizeof(T));
  }
  std::vector<T> out;
  std::vector<uint8_t> mask;
};

template <class T>
void expect_same(const Output<T>& have, const Output<T>& want) {
  for (size_t i = 0; i < want.out.size(); ++i) ASSERT_TRUE(same(have.out[i], want.out[i])) << i;
  ASSERT_EQ(have.mask, want.mask);
}

TYPED_TEST(Map, ForwardAndBackwardAreTheCpus) {
  Random random(11);
  for (const ChannelLayout& layout : kLayouts) {
    const int64_t n = layout.numel();
    const auto x = values<TypeParam>(n + 1, random);
    std::vector<float> scale;
    std::vector<int32_t> zero_point;
    for (int64_t c = 0; c < layout.channels; ++c) {
      scale.push_back(0.01f + 0.003f * static_cast<float>(c % 101));
      zero_point.push_back(static_cast<int32_t>(c * 7 % 41) - 20);
    }
    for (const Rounding rounding :
         {Rounding::half_even, Rounding::half_away, Rounding::floor_half_up}) {
      for (const Mask mask : {Mask::rounded, Mask::paper}) {
        // From the second element on the data is not aligned.
        const int64_t skip = random() % 2;
        Output<TypeParam> have(n), want(n), have_dx(n), want_dx(n), unmasked(n);
        FakeQuantJob job{x.data() + skip,   have.out.data(), have.mask.data(), layout, scale.data(),
                         zero_point.data(), {-128, 127},     rounding,         mask};
        gpu::emulation::machine().seed = random();
        cuda::fake_quant_forward(arrays::kDType<TypeParam>, job, nullptr);
        job.out = want.out.data();
        job.mask = want.mask.data();
        cpu::fake_quant_forward(arrays::kDType<TypeParam>, job);
        expect_same(have, want);
        if (testing::Test::HasFatalFailure()) return;
        job.out = unmasked.out.data();
        job.mask = nullptr;
        cuda::fake_quant_forward(arrays::kDType<TypeParam>, job, nullptr);
        std::fill(want.mask.begin(), want.mask.end(), kGuard);
        expect_same(unmasked, want);
        if (testing::Test::HasFatalFailure()) return;
        cuda::fake_quant_backward(arrays::kDType<TypeParam>, x.data() + skip, have.mask.data(),
                                  have_dx.out.data(), n, nullptr);
        cpu::fake_quant_backward(arrays::kDType<TypeParam>, x.data() + skip, have.mask.data(),
                                 want_dx.out.data(), n);
        expect_same(have_dx, want_dx);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TYPED_TEST(Map, ForwardOnFloatsIsTheCpus) {
  Random random(12);
  for (const core::NamedFormat& entry : core::kFloatFormats) {
    const int32_t end = static_cast<int32_t>(entry.format.largest);
    for (const ChannelLayout& layout : kLayouts) {
      const int64_t n = layout.numel();
      const auto x = values<TypeParam>(n, random);
      std::vector<float> scale;
      // Some channels are cut off, some reach into the subnormal numbers.
      for (int64_t c = 0; c < layout.channels; ++c)
        scale.push_back(std::ldexp(1.3f, static_cast<int>(c % 9) - 4));
      const std::vector<int32_t> zero_point(layout.channels);
      for (const Mask mask : {Mask::rounded, Mask::paper}) {
        Output<TypeParam> have(n), want(n);
        FakeQuantJob job{
            x.data(),          have.out.data(),           have.mask.data(),    layout, scale.data(),
            zero_point.data(), {-end, end, entry.format}, Rounding::half_even, mask};
        gpu::emulation::machine().seed = random();
        cuda::fake_quant_forward(arrays::kDType<TypeParam>, job, nullptr);
        job.out = want.out.data();
        job.mask = want.mask.data();
        cpu::fake_quant_forward(arrays::kDType<TypeParam>, job);
        expect_same(have, want);
        if (testing::Test::HasFatalFailure()) return;
      }
      // Both learned methods.
      for (const int32_t learned : {0, 1}) {
        if (learned == 1 && layout.channels > 1) continue;
        Output<TypeParam> have(n), want(n);
        FakeQuantJob job{x.data(),
                         have.out.data(),
                         nullptr,
                         layout,
                         scale.data(),
                         nullptr,
                         {-end, end, entry.format},
                         Rounding::half_even,
                         Mask::rounded,
                         learned};
        cuda::fake_quant_forward(arrays::kDType<TypeParam>, job, nullptr);
        job.out = want.out.data();
        cpu::fake_quant_forward(arrays::kDType<TypeParam>, job);
        expect_same(have, want);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

// Invalid qparams, for which the CPU raises, give NaN.
TYPED_TEST(Map, WrongQParamsGiveNan) {
  const float scale[] = {0.1f, 0.0f, -1.0f, INFINITY, NAN, 0.1f, 0.1f};
  const int32_t zero_point[] = {0, 0, 0, 0, 0, 128, -129};
  for (const int64_t inner : {1, 8, 11}) {
    const ChannelLayout layout{3, 7, inner};
    const std::vector<TypeParam> x(layout.numel());
    Output<TypeParam> y(layout.numel());
    cuda::fake_quant_forward(arrays::kDType<TypeParam>,
                             {x.data(),
                              y.out.data(),
                              y.mask.data(),
                              layout,
                              scale,
                              zero_point,
                              {-128, 127},
                              Rounding::half_even,
                              Mask::rounded},
                             nullptr);
    for (int64_t i = 0; i < layout.numel(); ++i) {
      const bool right = i / inner % 7 == 0;
      ASSERT_EQ(std::isnan(core::widen(y.out[i])), !right) << i;
      ASSERT_EQ((y.mask[i / 8] >> (i % 8) & 1) != 0, right) << i;
    }
  }
}

}  // namespace
