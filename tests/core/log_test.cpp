#include "core/log.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace {

using torch_ext::core::log;

double ulp_of(double x) {
  const double magnitude = std::fabs(x);
  return std::nextafter(magnitude, std::numeric_limits<double>::infinity()) - magnitude;
}

// Distance of our log from the 64-bit mantissa logarithm, in units of the result's last place.
double error_in_ulp(double x) {
  const long double expected = logl(static_cast<long double>(x));
  const auto rounded = static_cast<double>(expected);
  return static_cast<double>(fabsl(log(x) - expected)) / ulp_of(rounded);
}

TEST(Log, IsWithinOneUlpForEveryNormalExponent) {
  std::mt19937_64 random(7);
  for (uint64_t exponent = 1; exponent <= 2046; ++exponent) {
    for (int i = 0; i < 200; ++i) {
      const double x = __builtin_bit_cast(double, (exponent << 52) | (random() >> 12));
      ASSERT_LT(error_in_ulp(x), 1.0) << x;
    }
  }
}

TEST(Log, IsWithinOneUlpAroundOne) {
  std::mt19937_64 random(8);
  for (int i = 0; i < 500000; ++i) {
    const double offset = std::ldexp(static_cast<double>(random() >> 11), -53);  // [0, 1)
    for (const double x : {1.0 + offset, 1.0 - offset / 2, 1.0 + std::ldexp(offset, -i % 40)}) {
      ASSERT_LT(error_in_ulp(x), 1.0) << x;
    }
  }
}

TEST(Log, IsWithinOneUlpWhereTheReductionChangesOctave) {
  for (int exponent = -1022; exponent <= 1023; ++exponent) {
    const double border = std::ldexp(std::sqrt(2.0), exponent);
    double x = border;
    for (int i = 0; i < 50; ++i) x = std::nextafter(x, 0.0);
    for (int i = 0; i < 100; ++i) {
      ASSERT_LT(error_in_ulp(x), 1.0) << x;
      x = std::nextafter(x, std::numeric_limits<double>::infinity());
    }
  }
}

TEST(Log, IsExactAtOneAndRoundedAtPowersOfTwo) {
  EXPECT_EQ(log(1.0), 0.0);
  for (int exponent = -1022; exponent <= 1023; ++exponent) {
    const long double expected = exponent * logl(2.0L);
    ASSERT_EQ(log(std::ldexp(1.0, exponent)), static_cast<double>(expected)) << exponent;
  }
}

TEST(Log, IsWithinOneUlpAtTheEndsOfTheRange) {
  using limits = std::numeric_limits<double>;
  EXPECT_LT(error_in_ulp(limits::min()), 1.0);
  EXPECT_LT(error_in_ulp(limits::max()), 1.0);
}

// Distance of the mantissa part from the long double logarithm of what the exponent leaves.
double error_of_ratio(double a, double b) {
  const torch_ext::core::SplitLog split = torch_ext::core::log_ratio(a, b);
  EXPECT_EQ(split.exponent, std::rint(split.exponent));
  EXPECT_LT(std::fabs(split.mantissa), 0.5862 * std::log(2.0));
  const long double left =
      ldexpl(static_cast<long double>(a) / b, -static_cast<int>(split.exponent));
  return static_cast<double>(fabsl(split.mantissa - logl(left)));
}

TEST(LogRatio, IsWithin15e17OverTheWholeRange) {
  std::mt19937_64 random(9);
  for (int i = 0; i < 1000000; ++i) {
    const double a =
        std::ldexp(1.0 + static_cast<double>(random() >> 12) * 0x1p-52, i % 1900 - 950);
    const double b = std::ldexp(1.0 + static_cast<double>(random() >> 12) * 0x1p-52, i % 57 - 28);
    ASSERT_LT(error_of_ratio(a, b), 1.5e-16) << a << " / " << b;
  }
}

TEST(LogRatio, IsExactForEqualNumbersAndPowersOfTwo) {
  for (const double x : {0.1, 1.0, 3.0, 1e300, 1e-300}) {
    EXPECT_EQ(torch_ext::core::log_ratio(x, x).value(), 0.0);
    EXPECT_EQ(torch_ext::core::log_ratio(x, x / 8).exponent, 3.0);
    EXPECT_EQ(torch_ext::core::log_ratio(x, x / 8).mantissa, 0.0);
  }
}

// Small counts over small counts, as in a histogram: every quotient.
TEST(LogRatio, IsWithin15e17ForSmallIntegers) {
  for (int a = 1; a <= 1000; ++a) {
    for (int b = 1; b <= 1000; ++b) ASSERT_LT(error_of_ratio(a, b), 1.5e-16) << a << " / " << b;
  }
}

// The searches on CPU and CUDA agree only if these bits never change: not with the compiler, the
// instruction set or the device. The number is the hash of the results of the first build.
TEST(Log, HasTheSameBitsInEveryBuild) {
  std::vector<double> values(1 << 16);
  uint64_t lcg = 1;
  for (double& value : values) {
    lcg = lcg * 6364136223846793005u + 1442695040888963407u;
    value = __builtin_bit_cast(double, (lcg >> 2) | 0x0010000000000000u);  // 2^-1022 .. 2
  }
  uint64_t hash = 14695981039346656037u;
  std::vector<double> results(values.size());
  for (size_t i = 0; i < values.size(); ++i) results[i] = log(values[i]);
  for (size_t i = 0; i < values.size(); ++i) {
    results[i] += torch_ext::core::log_ratio(values[i] + 0x1p-900, 0x1.8p-500).mantissa;
  }
  for (const double result : results) {
    hash = (hash ^ __builtin_bit_cast(uint64_t, result)) * 1099511628211u;
  }
  EXPECT_EQ(hash, 17047454429717308550u);
}

}  // namespace
