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
// Around each size at which something changes: 256 lanes, 4096 values of a sum, rows of 32, parts
// of 64 elements, pieces of 1024.
constexpr ChannelLayout kLayouts[] = {
    {1, 1, 0},    {1, 1, 1},     {1, 1, 31},   {1, 1, 255},   {1, 1, 256},   {1, 1, 257},
    {1, 1, 1027}, {1, 1, 4096},  {1, 1, 4097}, {1, 1, 20011}, {3, 5, 40},    {2, 3, 5000},
    {70, 33, 1},  {9, 4, 9},     {1, 700, 3},  {300, 2, 31},  {2, 40, 32},   {65, 2, 1},
    {64, 16, 1},  {129, 17, 1},  {63, 64, 1},  {3, 1100, 1},  {70, 1024, 1}, {2, 1025, 1},
    {33, 2, 2},   {5, 300, 8},   {7, 33, 31},  {40, 2, 33},   {2, 5, 256},   {2, 3, 257},
    {1, 2, 4095}, {1, 2, 12289}, {4100, 2, 31}};
// So many parts that their sums are summed twice.
constexpr ChannelLayout kManyParts[] = {{4097 * 64, 2, 1}, {4099, 2, 32}};

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
    return {method,
            x.data(),
            grad.data(),
            run.dx.data(),
            layout,
            parameter.data(),
            zero_point.data(),
            {quant_min, kQuantMax},
            kElements,
            run.d_parameter.data(),
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
            {quant_min, kQuantMax},
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

// An element's terms of the gradients of the parameter and of the zero point, and whether its
// gradient passes. `step`: the parameter's term for an upstream gradient of 1, in the unit in which
// it is summed: the scale of lsq.
struct Plain {
  bool inside;
  long double parameter, zero_point, step;
};
template <class T>
Plain lsq(const Given<T>& given, int64_t i, int64_t c) {
  using C = core::compute_t<T>;
  const C scale = static_cast<C>(std::fabs(given.parameter[c]));
  const C v = core::widen(given.x[i]) / scale;
  const C code = v + static_cast<C>(given.zero_point[c]);
  const long double x = core::widen(given.x[i]), z = given.zero_point[c], s = scale;
  if (code <= given.quant_min) return {false, given.quant_min - z, -s, (given.quant_min - z) * s};
  if (code >= kQuantMax) return {false, kQuantMax - z, -s, (kQuantMax - z) * s};
  return {true, std::nearbyint(v) - x / s, 0, std::nearbyint(v) * s - x};
}
template <class T>
Plain pact(const Given<T>& given, int64_t i, int64_t c) {
  const double x = core::widen(given.x[i]), level = std::fabs(given.parameter[c]);
  const bool two_sided = given.quant_min < 0;
  if (x >= level) return {false, 1, 0, 1};
  if (two_sided && x <= -level) return {false, -1, 0, -1};
  return {two_sided || x >= 0, 0, 0, 0};
}
template <class T>
Plain plain_of(const Given<T>& given, int64_t i, int64_t c) {
  return given.method == kLsq ? lsq(given, i, c) : pact(given, i, c);
}

// The order in which values are summed, as core/learned.h and core/parts.h say it.
double in_lanes(std::vector<double> values) {
  if (values.empty()) return 0;
  while (values.size() > 1) {
    std::vector<double> sums;
    for (size_t begin = 0; begin < values.size(); begin += 4096) {
      std::vector<double> lane(256);
      for (size_t i = begin; i < std::min(values.size(), begin + 4096); ++i)
        lane[(i - begin) % 256] += values[i];
      for (size_t distance = 128; distance > 0; distance /= 2)
        for (size_t l = 0; l < distance; ++l) lane[l] += lane[l + distance];
      sums.push_back(lane[0]);
    }
    values = sums;
  }
  return values[0];
}
// `value(i)` is element i's, of channel c.
template <class Value>
double in_order(const ChannelLayout& layout, int64_t c, const Value& value) {
  std::vector<double> parts;
  const auto row = [&](int64_t o) { return (o * layout.channels + c) * layout.inner; };
  if (layout.channels > 1 && layout.inner < 32) {
    const int64_t rows = std::max<int64_t>(1, 64 / layout.inner);
    for (int64_t o = 0; o < layout.outer; ++o) {
      if (o % rows == 0) parts.push_back(0);
      for (int64_t i = 0; i < layout.inner; ++i) parts.back() += value(row(o) + i);
    }
  } else {
    for (int64_t o = 0; o < layout.outer; ++o) {
      for (int64_t begin = 0; begin < layout.inner; begin += 4096) {
        std::vector<double> piece;
        for (int64_t i = begin; i < std::min(layout.inner, begin + 4096); ++i)
          piece.push_back(value(row(o) + i));
        parts.push_back(in_lanes(piece));
      }
    }
  }
  return in_lanes(parts);
}

template <class T>
void expect_order(const Given<T>& given, const Run<T>& run) {
  for (int64_t c = 0; c < given.layout.channels; ++c) {
    const double sum = in_order(given.layout, c, [&](int64_t i) {
      return static_cast<double>(core::widen(given.grad[i])) *
             static_cast<double>(plain_of(given, i, c).step);
    });
    const double clipped = in_order(given.layout, c, [&](int64_t i) {
      return plain_of(given, i, c).inside ? 0.0 : static_cast<double>(core::widen(given.grad[i]));
    });
    const double scale = std::fabs(given.parameter[c]), sign = given.parameter[c] < 0 ? -1 : 1;
    const double factor = given.method == kLsq ? 1 / std::sqrt(given.kElements * kQuantMax) : 1;
    const double in_units = given.method == kLsq ? sum / scale : sum;
    ASSERT_EQ(run.d_parameter[c], static_cast<float>(sign * (in_units * factor))) << c;
    if (given.method == kPact) continue;
    ASSERT_EQ(run.d_zero_point[c], static_cast<float>(-scale * clipped)) << c;
    ASSERT_EQ(run.d_mixed[c], static_cast<float>(sign * (-clipped * factor))) << c;
  }
}

template <class T>
void expect_formulas(const Given<T>& given, const Run<T>& run) {
  const ChannelLayout& layout = given.layout;
  std::vector<long double> sum(layout.channels), zero_sum(layout.channels), size(layout.channels);
  for (int64_t i = 0; i < layout.numel(); ++i) {
    const int64_t c = i / layout.inner % layout.channels;
    const long double upstream = core::widen(given.grad[i]);
    const Plain plain = plain_of(given, i, c);
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

template <class T>
void run_on_device(const LearnedJob& job, Random& random) {
  gpu::emulation::machine() = statistic_plain::pick(machines::kMachines, random);
  gpu::emulation::machine().seed = random();
  machines::Scratch scratch(cuda::learned_backward_scratch(job));
  cuda::learned_backward(arrays::kDType<T>, job, scratch.data(), nullptr);
}

TYPED_TEST(Learned, BackwardIsThePapersAndHasTheSameBitsEverywhere) {
  Random random(61);
  for (const ChannelLayout& layout : kLayouts) {
    for (const int32_t method : {kLsq, kPact}) {
      for (const int32_t quant_min : {-16, 0}) {
        SCOPED_TRACE(testing::Message() << layout.outer << " x " << layout.channels << " x "
                                        << layout.inner << ", method " << method);
        const Given<TypeParam> given(method, layout, quant_min, random);
        Run<TypeParam> single(layout.numel(), layout.channels), many = single, device = single;
        cpu::test_threads() = 1;
        cpu::learned_backward(arrays::kDType<TypeParam>, given.job(single));
        expect_formulas(given, single);
        expect_order(given, single);
        if (testing::Test::HasFatalFailure()) return;
        cpu::test_threads() = 5;
        cpu::learned_backward(arrays::kDType<TypeParam>, given.job(many));
        ASSERT_TRUE(single == many);
        run_on_device<TypeParam>(given.job(device), random);
        ASSERT_TRUE(single == device);
      }
    }
  }
  cpu::test_threads() = 2;
}

TYPED_TEST(Learned, TheSumsOfManyPartsAreSummedInTheSameOrder) {
  Random random(63);
  for (const ChannelLayout& layout : kManyParts) {
    const Given<TypeParam> given(kLsq, layout, -16, random);
    Run<TypeParam> run(layout.numel(), layout.channels), many = run;
    cpu::test_threads() = 1;
    cpu::learned_backward(arrays::kDType<TypeParam>, given.job(run));
    expect_order(given, run);
    if (testing::Test::HasFatalFailure()) return;
    cpu::test_threads() = 7;
    cpu::learned_backward(arrays::kDType<TypeParam>, given.job(many));
    ASSERT_TRUE(run == many);
  }
  cpu::test_threads() = 2;
}

TYPED_TEST(Learned, AGradientThatIsNotWantedChangesNoOther) {
  Random random(64);
  for (const ChannelLayout& layout : kLayouts) {
    for (const int32_t method : {kLsq, kPact}) {
      const Given<TypeParam> given(method, layout, -16, random);
      const Run<TypeParam> blank(layout.numel(), layout.channels);
      Run<TypeParam> all = blank;
      cpu::learned_backward(arrays::kDType<TypeParam>, given.job(all));
      for (const bool on_device : {false, true}) {
        for (const bool of_x : {false, true}) {
          for (const bool of_parameter : {false, true}) {
            Run<TypeParam> run = blank, want = all;
            LearnedJob job = given.job(run);
            job.d_zero_point = job.d_mixed = nullptr;
            want.d_zero_point = blank.d_zero_point;
            want.d_mixed = blank.d_mixed;
            if (!of_x) {
              job.dx = nullptr;
              want.dx = blank.dx;
            }
            if (!of_parameter) {
              job.d_parameter = nullptr;
              want.d_parameter = blank.d_parameter;
            }
            if (on_device)
              run_on_device<TypeParam>(job, random);
            else
              cpu::learned_backward(arrays::kDType<TypeParam>, job);
            ASSERT_TRUE(run == want) << on_device << of_x << of_parameter << " of method " << method
                                     << ", rows of " << layout.inner;
          }
        }
      }
    }
  }
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
          const Plain plain = plain_of(given, i, c);
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
