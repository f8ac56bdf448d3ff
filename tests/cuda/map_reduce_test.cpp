#include "cpu/map_reduce.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "arrays.h"
#include "machines.h"
#include "mutations.h"
#include "parallel_threads.h"
#include "registry.h"

// The derivatives of learned fake-quants: the CPU's against the papers' formulas in long double,
// for any number of threads, and the kernels of map_reduce.cu, run on the host, against the CPU's
// bits.
namespace {

using namespace torch_ext;
using core::ChannelLayout;
using core::LearnedJob;
using core::TangentJob;
using statistic_plain::Random;

constexpr int32_t kLsq = 0, kPact = 1, kQuantMax = 15;
constexpr ChannelLayout kLayouts[] = {{1, 1, 0},     {1, 1, 1},   {1, 1, 31},   {1, 1, 4097},
                                      {1, 1, 20011}, {3, 5, 40},  {2, 3, 5000}, {70, 33, 1},
                                      {9, 4, 9},     {1, 700, 3}, {300, 2, 31}, {2, 40, 32}};

template <class T>
class Learned : public testing::Test {};
using Types = testing::Types<float, double, core::half, core::bfloat16>;
TYPED_TEST_SUITE(Learned, Types);

template <class T>
struct Run {
  Run(int64_t n, int64_t channels)
      : dx(n), d_parameter(channels), d_zero_point(channels), d_mixed(channels) {}
  bool operator==(const Run& other) const {
    return std::memcmp(dx.data(), other.dx.data(), dx.size() * sizeof(T)) == 0 &&
           std::memcmp(d_parameter.data(), other.d_parameter.data(), 4 * d_parameter.size()) == 0 &&
           std::memcmp(d_zero_point.data(), other.d_zero_point.data(), 4 * d_zero_point.size()) ==
               0 &&
           std::memcmp(d_mixed.data(), other.d_mixed.data(), 4 * d_mixed.size()) == 0;
  }
  std::vector<T> dx;
  std::vector<float> d_parameter, d_zero_point, d_mixed;
};

template <class T>
struct Given {
  Given(int32_t method, const ChannelLayout& layout, int32_t quant_min, Random& random)
      : method(method), layout(layout), quant_min(quant_min) {
    const auto draw = [&](double deviation) {
      T value;
      arrays::store(static_cast<float>(std::normal_distribution<double>(0, deviation)(random)),
                    value);
      return value;
    };
    for (int64_t i = 0; i < layout.numel(); ++i) {
      x.push_back(draw(2));
      grad.push_back(draw(1));
    }
    for (int64_t c = 0; c < layout.channels; ++c) {
      // Negative parameters too: an optimizer can make them negative.
      const float sign = random() % 4 == 0 ? -1.0f : 1.0f;
      parameter.push_back(sign * (method == kLsq ? 0.05f : 2.0f) * static_cast<float>(1 + c % 7));
      zero_point.push_back(method == kLsq ? std::max(quant_min, static_cast<int32_t>(c % 5) - 2)
                                          : 0);
    }
  }
  LearnedJob job(Run<T>& run) const {
    return {method, x.data(), grad.data(), run.dx.data(), layout, parameter.data(),
            zero_point.data(), quant_min, kQuantMax, kElements, run.d_parameter.data(),
            // A fixed zero point has no gradient.
            method == kPact ? nullptr : run.d_zero_point.data(),
            method == kPact ? nullptr : run.d_mixed.data()};
  }
  // The tangent of x is `grad`; those of the channels, where given, are drawn.
  TangentJob tangent_job(std::vector<T>& out, const std::vector<float>* tangents) const {
    return {method,
            x.data(),
            tangents == nullptr || tangents[3].empty() ? nullptr : grad.data(),
            out.data(),
            layout,
            parameter.data(),
            zero_point.data(),
            quant_min,
            kQuantMax,
            kElements,
            tangents == nullptr ? nullptr : tangents[0].data(),
            tangents == nullptr ? nullptr : tangents[1].data(),
            tangents == nullptr ? nullptr : tangents[2].data()};
  }
  long double factor(int64_t c) const {
    const long double scaled =
        method == kLsq ? 1 / std::sqrt(kElements * static_cast<long double>(kQuantMax)) : 1;
    return parameter[c] < 0 ? -scaled : scaled;
  }

  static constexpr double kElements = 100;
  int32_t method;
  ChannelLayout layout;
  int32_t quant_min;
  std::vector<T> x, grad;
  std::vector<float> parameter;
  std::vector<int32_t> zero_point;
};

// An element's terms of the gradients of the parameter and of the zero point, and the gradient of
// x.
struct Plain {
  bool inside;
  long double parameter, zero_point;
};
template <class T>
Plain lsq(const Given<T>& given, int64_t i, int64_t c) {
  using C = core::compute_t<T>;
  const C scale = static_cast<C>(std::fabs(given.parameter[c]));
  const C v = core::widen(given.x[i]) / scale;
  const C code = v + static_cast<C>(given.zero_point[c]);
  const long double x = core::widen(given.x[i]), z = given.zero_point[c];
  if (code <= given.quant_min)
    return {false, given.quant_min - z, -static_cast<long double>(scale)};
  if (code >= kQuantMax) return {false, kQuantMax - z, -static_cast<long double>(scale)};
  return {true, std::nearbyint(v) - x / scale, 0};
}
template <class T>
Plain pact(const Given<T>& given, int64_t i, int64_t c) {
  const double x = core::widen(given.x[i]), level = std::fabs(given.parameter[c]);
  const bool two_sided = given.quant_min < 0;
  if (x >= level) return {false, 1, 0};
  if (two_sided && x <= -level) return {false, -1, 0};
  return {two_sided || x >= 0, 0, 0};
}

template <class T>
void expect_formulas(const Given<T>& given, const Run<T>& run) {
  const ChannelLayout& layout = given.layout;
  std::vector<long double> sum(layout.channels), zero_sum(layout.channels), size(layout.channels);
  for (int64_t i = 0; i < layout.numel(); ++i) {
    const int64_t c = i / layout.inner % layout.channels;
    const long double upstream = core::widen(given.grad[i]);
    const Plain plain = given.method == kLsq ? lsq(given, i, c) : pact(given, i, c);
    sum[c] += upstream * plain.parameter;
    zero_sum[c] += upstream * plain.zero_point;
    size[c] += std::fabs(upstream) * (1 + std::fabs(plain.parameter));
    ASSERT_EQ(core::widen(run.dx[i]), plain.inside ? core::widen(given.grad[i]) : 0) << i;
  }
  for (int64_t c = 0; c < layout.channels; ++c) {
    const long double want = sum[c] * given.factor(c);
    const long double mixed = zero_sum[c] / std::fabs(given.parameter[c]) * given.factor(c);
    // Half a unit of float32 for the result, and what float64 loses in the sum.
    const auto bound = [&](long double value) {
      return 0x1p-24L * std::fabs(value) + 1e-14L * size[c] + 1e-37L;
    };
    ASSERT_LE(std::fabs(run.d_parameter[c] - want), bound(want)) << "channel " << c;
    ASSERT_LE(std::fabs(run.d_zero_point[c] - zero_sum[c]), bound(zero_sum[c])) << "channel " << c;
    if (given.method == kLsq) {
      ASSERT_LE(std::fabs(run.d_mixed[c] - mixed), bound(mixed)) << "channel " << c;
    }
  }
}

TYPED_TEST(Learned, BackwardIsThePapersAndHasTheSameBitsEverywhere) {
  Random random(61);
  for (const ChannelLayout& layout : kLayouts) {
    for (const int32_t method : {kLsq, kPact}) {
      for (const int32_t quant_min : {-16, 0}) {
        const Given<TypeParam> given(method, layout, quant_min, random);
        Run<TypeParam> single(layout.numel(), layout.channels), many = single, device = single;
        cpu::test_threads() = 1;
        cpu::learned_backward(arrays::kDType<TypeParam>, given.job(single));
        expect_formulas(given, single);
        if (testing::Test::HasFatalFailure()) return;
        cpu::test_threads() = 5;
        cpu::learned_backward(arrays::kDType<TypeParam>, given.job(many));
        ASSERT_TRUE(single == many);
        gpu::emulation::machine() = statistic_plain::pick(machines::kMachines, random);
        gpu::emulation::machine().seed = random();
        const LearnedJob job = given.job(device);
        machines::Scratch scratch(cuda::learned_backward_scratch(job));
        cuda::learned_backward(arrays::kDType<TypeParam>, job, scratch.data(), nullptr);
        ASSERT_TRUE(single == device);
      }
    }
  }
  cpu::test_threads() = 2;
}

using FloatRun = Run<float>;  // Run is a name of testing::Test too

TEST(LearnedBackward, BarriersAreNeeded) {
  Random random(63);
  gpu::emulation::machine() = machines::kMachines[0];
  for (const ChannelLayout& layout : {ChannelLayout{1, 1, 20011}, ChannelLayout{70, 33, 1}}) {
    const Given<float> given(kLsq, layout, -16, random);
    FloatRun want(layout.numel(), layout.channels);
    cpu::learned_backward(core::DType::f32, given.job(want));
    // With one channel the thread that has the last sum stores it.
    const size_t spare = layout.channels == 1 ? 1 : 0;
    mutations::expect_barriers_are_needed(spare, [&] {
      FloatRun have(layout.numel(), layout.channels);
      const LearnedJob job = given.job(have);
      machines::Scratch scratch(cuda::learned_backward_scratch(job));
      cuda::learned_backward(core::DType::f32, job, scratch.data(), nullptr);
      return have == want;
    });
  }
}

TYPED_TEST(Learned, TheTangentIsThePapersDerivativeAndHasTheSameBitsEverywhere) {
  Random random(62);
  std::normal_distribution<float> normal;
  for (const ChannelLayout& layout : kLayouts) {
    for (const int32_t method : {kLsq, kPact}) {
      for (const bool has_tangents : {true, false}) {
        const Given<TypeParam> given(method, layout, -16, random);
        std::vector<float> tangents[4];
        for (int part = 0; part < 3; ++part)
          for (int64_t c = 0; c < layout.channels; ++c) tangents[part].push_back(normal(random));
        if (random() % 2 == 0) tangents[3] = {1};  // x has a tangent
        const std::vector<float>* const used = has_tangents ? tangents : nullptr;
        std::vector<TypeParam> single(layout.numel()), many = single, device = single;
        cpu::test_threads() = 1;
        cpu::learned_tangent(arrays::kDType<TypeParam>, given.tangent_job(single, used));
        for (int64_t i = 0; i < layout.numel(); ++i) {
          const int64_t c = i / layout.inner % layout.channels;
          const Plain plain = method == kLsq ? lsq(given, i, c) : pact(given, i, c);
          long double want = 0, size = 0;
          const auto add = [&](long double term) {
            want += term;
            size += std::fabs(term);
          };
          if (used != nullptr) {
            const long double outside = plain.zero_point / std::fabs(given.parameter[c]);
            if (!tangents[3].empty() && plain.inside) add(core::widen(given.grad[i]));
            add(tangents[0][c] * given.factor(c) * plain.parameter);
            add(tangents[1][c] * plain.zero_point);
            add(tangents[2][c] * given.factor(c) * outside);
          }
          const long double step = sizeof(TypeParam) == 2 ? 0x1p-8L : 0x1p-23L;
          ASSERT_LE(std::fabs(core::widen(single[i]) - want), step * size + 1e-7L) << i;
        }
        const auto expect_same = [&](const std::vector<TypeParam>& other) {
          ASSERT_EQ(std::memcmp(single.data(), other.data(), single.size() * sizeof(TypeParam)), 0);
        };
        cpu::test_threads() = 5;
        cpu::learned_tangent(arrays::kDType<TypeParam>, given.tangent_job(many, used));
        expect_same(many);
        gpu::emulation::machine() = statistic_plain::pick(machines::kMachines, random);
        gpu::emulation::machine().seed = random();
        cuda::learned_tangent(arrays::kDType<TypeParam>, given.tangent_job(device, used), nullptr);
        expect_same(device);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
  cpu::test_threads() = 2;
}

}  // namespace
