#pragma once

#include <concepts>
#include <cstdint>

#include "core/host_device.h"
#include "core/unit_grid.h"

// The interface of fake-quants with a learned parameter per channel (or one in all), and the order
// in which their gradients are summed.
namespace torch_ext::core {

// What backward gives for one element: the gradient of x, and its terms of the gradients of the
// parameter and of the zero point.
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
  { F::per_channel } -> std::convertible_to<bool>;  // false: one parameter and no zero point
  { F::start } -> std::convertible_to<double>;  // start value; 0: from the data, by rule mean_abs
  { F::effective(parameter) } -> std::same_as<float>;
  { F::sign(parameter) } -> std::same_as<double>;
  { F::gradient_scale(x, n) } -> std::same_as<double>;
  { F::template unit_grid<float>(parameter, n, Codes{}) } -> std::same_as<UnitGrid<float>>;
  // x, its upstream gradient, the grid, the effective parameter, 1 / scale.
  {
    F::template backward<float>(parameter, parameter, UnitGrid<float>{}, parameter, x)
  } -> std::same_as<Terms<float>>;
};

// Sums are taken in one fixed order, on every device and for any number of threads: value i is
// added to lane i mod 32, in ascending order; then lane l + d is added to lane l for d = 16, 8, 4,
// 2, 1.
constexpr int kSumLanes = 32;
// At most so many values are summed that way; the sums of longer data are summed again in the same
// way.
constexpr int64_t kSumLength = 4096;

TE_HD double sum_lanes(double (&lane)[kSumLanes]) {
  for (int distance = kSumLanes / 2; distance > 0; distance /= 2)
    for (int l = 0; l < distance; ++l) lane[l] += lane[l + distance];
  return lane[0];
}

TE_HD int64_t sums_of(int64_t values) { return (values + kSumLength - 1) / kSumLength; }

}  // namespace torch_ext::core
