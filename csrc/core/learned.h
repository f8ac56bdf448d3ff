#pragma once

#include <concepts>
#include <cstdint>

#include "core/affine.h"
#include "core/host_device.h"

// Fake-quants with a learned parameter for each channel, and the order in which their gradients are
// summed.
namespace torch_ext::core {

// What one element adds: its own gradient, and those of the parameter and of the zero point.
template <typename T>
struct Terms {
  T dx;
  double parameter;
  double zero_point;
};

template <class F>
concept LearnedFakeQuant = requires(float parameter, int32_t n, double x) {
  { F::name } -> std::convertible_to<const char*>;
  { F::parameter } -> std::convertible_to<const char*>;
  { F::per_channel } -> std::convertible_to<bool>;  // else one parameter and no zero point
  { F::start } -> std::convertible_to<double>;      // 0: from the data, by the rule mean_abs
  { F::effective(parameter) } -> std::same_as<float>;
  { F::sign(parameter) } -> std::same_as<double>;
  { F::gradient_scale(x, n) } -> std::same_as<double>;
  { F::template affine<float>(parameter, n, n, n) } -> std::same_as<Affine<float>>;
  // Of one element, with its upstream gradient, the effective parameter and 1 / scale.
  {
    F::template backward<float>(parameter, parameter, Affine<float>{}, parameter, x)
  } -> std::same_as<Terms<float>>;
};

// A sum in one order on every device and for any number of threads: value i goes to lane i mod 32,
// in ascending order, and the lanes are added in pairs 16, 8, 4, 2 and 1 apart.
constexpr int kSumLanes = 32;
// Values that are summed so at a time; their sums are values again.
constexpr int64_t kSumLength = 4096;

TE_HD double sum_lanes(double (&lane)[kSumLanes]) {
  for (int distance = kSumLanes / 2; distance > 0; distance /= 2)
    for (int l = 0; l < distance; ++l) lane[l] += lane[l + distance];
  return lane[0];
}

TE_HD int64_t sums_of(int64_t values) { return (values + kSumLength - 1) / kSumLength; }

}  // namespace torch_ext::core
