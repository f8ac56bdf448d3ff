#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "arrays.h"
#include "cpu/map_reduce.h"
#include "float_format_plain.h"
#include "machines.h"
#include "parallel_threads.h"
#include "registry.h"

// The derivatives of learned fake-quants on float formats: the CPU's against lsq's formula with the
// nearest number in place of the nearest integer, and the kernels of map_reduce.cu, run on the
// host, against the CPU's bits.
namespace {

using namespace torch_ext;
using core::ChannelLayout;
using core::LearnedJob;
using core::TangentJob;
using statistic_plain::Random;

constexpr double kElements = 100;
constexpr ChannelLayout kLayouts[] = {{1, 1, 20011}, {2, 3, 5000}, {70, 33, 1}, {9, 4, 9}};

template <class T>
class LearnedFloats : public testing::Test {};
using Types = testing::Types<float, double, core::half, core::bfloat16>;
TYPED_TEST_SUITE(LearnedFloats, Types);

core::Codes codes_of(const float_plain::Format& f) {
  const core::FloatFormat& format = core::format_named(f.name)->format;
  const int32_t end = static_cast<int32_t>(format.largest);
  return {-end, end, format};
}

template <class T>
struct Given {
  Given(const float_plain::Format& f, const ChannelLayout& layout, Random& random)
      : layout(layout), codes(codes_of(f)), zero_point(layout.channels) {
    std::normal_distribution<double> normal;
    const auto draw = [&](double deviation) {
      T value;
      arrays::store(static_cast<float>(normal(random) * deviation), value);
      return value;
    };
    for (int64_t i = 0; i < layout.numel(); ++i) {
      x.push_back(draw(std::ldexp(1.0, static_cast<int>(random() % 12) - 8)));
      grad.push_back(draw(1));
    }
    for (int64_t c = 0; c < layout.channels; ++c) {
      const float sign = random() % 4 == 0 ? -1.0f : 1.0f;
      parameter.push_back(sign * 4.7f / codes.format.largest * static_cast<float>(1 + c % 7));
    }
  }
  ChannelLayout layout;
  core::Codes codes;
  std::vector<T> x, grad;
  std::vector<float> parameter;
  std::vector<int32_t> zero_point;
};

template <class T>
struct Gradients {
  Gradients(const ChannelLayout& layout) : dx(layout.numel()), d_parameter(layout.channels) {}
  LearnedJob job(const Given<T>& given, int32_t method) {
    return {method,
            given.x.data(),
            given.grad.data(),
            dx.data(),
            given.layout,
            given.parameter.data(),
            given.zero_point.data(),
            given.codes,
            kElements,
            d_parameter.data(),
            nullptr};
  }
  bool operator==(const Gradients& other) const {
    return std::memcmp(dx.data(), other.dx.data(), dx.size() * sizeof(T)) == 0 &&
           std::memcmp(d_parameter.data(), other.d_parameter.data(), 4 * d_parameter.size()) == 0;
  }
  std::vector<T> dx;
  std::vector<float> d_parameter;
};

template <class T>
void run_on_device(const LearnedJob& job, Random& random) {
  gpu::emulation::machine() = statistic_plain::pick(machines::kMachines, random);
  gpu::emulation::machine().seed = random();
  machines::Scratch scratch(cuda::learned_backward_scratch(job));
  cuda::learned_backward(arrays::kDType<T>, job, scratch.data(), nullptr);
}

template <class T>
void expect_formula(const float_plain::Format& f, const Given<T>& given, const Gradients<T>& have) {
  using C = core::compute_t<T>;
  const ChannelLayout& layout = given.layout;
  const long double largest = float_plain::decode(f, f.numbers - 1);
  std::vector<long double> sum(layout.channels), size(layout.channels);
  for (int64_t i = 0; i < layout.numel(); ++i) {
    const int64_t c = i / layout.inner % layout.channels;
    const float scale = std::fabs(given.parameter[c]);
    const C x = core::widen(given.x[i]), v = x / static_cast<C>(scale);
    const bool inside = -largest < v && v < largest;
    const long double upstream = core::widen(given.grad[i]);
    const long double exact = static_cast<long double>(x) / static_cast<long double>(scale);
    const long double term =
        inside ? float_plain::nearest(f, v) - exact : std::copysign(largest, v);
    sum[c] += upstream * term;
    size[c] += std::fabs(upstream) * (1 + std::fabs(term));
    ASSERT_EQ(core::widen(have.dx[i]), inside ? core::widen(given.grad[i]) : 0) << i;
  }
  for (int64_t c = 0; c < layout.channels; ++c) {
    const long double sign = given.parameter[c] < 0 ? -1 : 1;
    const long double want = sign * sum[c] / std::sqrt(kElements * largest);
    ASSERT_LE(std::fabs(have.d_parameter[c] - want),
              0x1p-24L * std::fabs(want) + 1e-14L * size[c] + 1e-37L)
        << f.name << " channel " << c;
  }
}

TYPED_TEST(LearnedFloats, BackwardIsLsqsAndHasTheSameBitsEverywhere) {
  Random random(65);
  for (const float_plain::Format& f : float_plain::kFormats) {
    for (const ChannelLayout& layout : kLayouts) {
      for (const int32_t method : {0, 1}) {
        if (method == 1 && layout.channels > 1) continue;  // pact has one parameter
        const Given<TypeParam> given(f, layout, random);
        Gradients<TypeParam> single(layout), many(layout), device(layout);
        cpu::test_threads() = 1;
        cpu::learned_backward(arrays::kDType<TypeParam>, single.job(given, method));
        if (method == 0) expect_formula(f, given, single);
        if (testing::Test::HasFatalFailure()) return;
        cpu::test_threads() = 5;
        cpu::learned_backward(arrays::kDType<TypeParam>, many.job(given, method));
        ASSERT_TRUE(single == many) << f.name;
        run_on_device<TypeParam>(device.job(given, method), random);
        ASSERT_TRUE(single == device) << f.name;
      }
    }
  }
  cpu::test_threads() = 2;
}

TYPED_TEST(LearnedFloats, TheTangentHasTheSameBitsEverywhere) {
  Random random(66);
  std::normal_distribution<float> normal;
  for (const float_plain::Format& f : float_plain::kFormats) {
    for (const ChannelLayout& layout : kLayouts) {
      const Given<TypeParam> given(f, layout, random);
      std::vector<float> tangent(layout.channels);
      for (float& each : tangent) each = normal(random);
      const auto job_of = [&](std::vector<TypeParam>& out) {
        return TangentJob{0,
                          given.x.data(),
                          given.grad.data(),
                          out.data(),
                          layout,
                          given.parameter.data(),
                          given.zero_point.data(),
                          given.codes,
                          kElements,
                          tangent.data(),
                          nullptr,
                          nullptr};
      };
      std::vector<TypeParam> host(layout.numel()), device = host;
      cpu::learned_tangent(arrays::kDType<TypeParam>, job_of(host));
      gpu::emulation::machine().seed = random();
      cuda::learned_tangent(arrays::kDType<TypeParam>, job_of(device), nullptr);
      ASSERT_EQ(std::memcmp(host.data(), device.data(), host.size() * sizeof(TypeParam)), 0)
          << f.name;
    }
  }
}

}  // namespace
