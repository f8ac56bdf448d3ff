#pragma once

#include <concepts>
#include <cstdint>

#include "core/host_device.h"
#include "core/unit_grid.h"

// The interface of fake-quants with a learned parameter per channel (or one in all), and the order
// in which their gradients are summed.
namespace torch_ext::core {

// What backward gives for one element: the gradient of x, its term of the gradient of the
// parameter, times F::unit(parameter), and the upstream gradient where x is clipped, else 0: its
// term of the gradient of the zero point, divided by minus the scale. A method's `unit` is what
// makes a term one product of exact factors; the sums over a channel are divided by it.
template <typename T>
struct Terms {
  T dx;
  double parameter;
  double clipped;
};

// n * scale - x, exact where n is x / scale rounded to an integer of at most 17 bits: the
// difference is a multiple of the last bit of x or of scale, and at most about half of scale. So it
// is for numbers of a float format, where the step between them takes the place of 1.
TE_HD float rounding_error(float n, float scale, float x) {
#if defined(__FMA__) || defined(__CUDA_ARCH__)
  return __builtin_fmaf(n, scale, -x);
#else
  return static_cast<float>(static_cast<double>(n) * static_cast<double>(scale) -
                            static_cast<double>(x));
#endif
}
// The product is exact too: scale is a float32.
TE_HD double rounding_error(double n, double scale, double x) { return n * scale - x; }

template <class F>
concept LearnedFakeQuant = requires(float parameter, int32_t n, double x) {
  { F::name } -> std::convertible_to<const char*>;
  { F::parameter } -> std::convertible_to<const char*>;
  { F::per_channel } -> std::convertible_to<bool>;  // false: one parameter and no zero point
  { F::start } -> std::convertible_to<double>;  // start value; 0: from the data, by rule mean_abs
  { F::effective(parameter) } -> std::same_as<float>;
  { F::sign(parameter) } -> std::same_as<double>;
  { F::unit(parameter) } -> std::same_as<double>;
  { F::gradient_scale(x, x) } -> std::same_as<double>;
  { F::template unit_grid<float>(parameter, n, Codes{}) } -> std::same_as<UnitGrid<float>>;
  // x, its upstream gradient, the grid, the effective parameter.
  {
    F::template backward<float>(parameter, parameter, UnitGrid<float>{}, parameter)
  } -> std::same_as<Terms<float>>;
};

// Sums are taken in one fixed order, on every device and for any number of threads: value i is
// added to lane i mod 256, in ascending order; then lane l + d is added to lane l for d = 128, 64,
// ..., 1. With so many lanes a thread of a CUDA warp has eight of them, and so reads 16 bytes at a
// time.
constexpr int kSumLanes = 256;
// At most so many values are summed that way; the sums of longer data are summed again in the same
// way.
constexpr int64_t kSumLength = 4096;

TE_HD int64_t sums_of(int64_t values) { return (values + kSumLength - 1) / kSumLength; }

// Adds the lanes in pairs. `lanes`: a power of two from which on all of them are 0.
TE_HD double sum_lanes(double (&lane)[kSumLanes], int lanes = kSumLanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    for (int l = 0; l < distance; ++l) lane[l] += lane[l + distance];
  return lane[0];
}

// How many lanes `count` values reach, as a power of two.
TE_HD int lanes_of(int64_t count) {
  int lanes = 1;
  while (lanes < kSumLanes && lanes < count) lanes *= 2;
  return lanes;
}

}  // namespace torch_ext::core
