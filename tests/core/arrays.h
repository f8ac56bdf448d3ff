#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "core/job.h"
#include "statistic_plain.h"
#include "unit_grid_plain.h"

// Arrays of any strided layout, and their values by index.
namespace arrays {

using statistic_plain::between;
using statistic_plain::Random;
using statistic_plain::Values;
using torch_ext::core::bfloat16;
using torch_ext::core::DType;
using torch_ext::core::half;

template <class T>
constexpr DType kDType = DType::f32;
template <>
constexpr DType kDType<double> = DType::f64;
template <>
constexpr DType kDType<half> = DType::f16;
template <>
constexpr DType kDType<bfloat16> = DType::bf16;

// The value that a statistic counts for an element: float64 is rounded to float32, the half types
// are exact.
inline float counted(float x) { return x; }
inline float counted(double x) { return static_cast<float>(x); }
inline float counted(half x) { return static_cast<float>(plain::decode(x.bits, plain::kHalf)); }
inline float counted(bfloat16 x) {
  return static_cast<float>(plain::decode(x.bits, plain::kBfloat16));
}

// An element near x; truncation is precise enough.
inline void store(float x, float& out) { out = x; }
inline void store(float x, double& out) { out = x * (1 + 0x1p-30); }
inline void store(float x, bfloat16& out) {
  out.bits = static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16);
}
inline void store(float x, half& out) { out = torch_ext::core::to_half(x); }

template <class T>
struct Array {
  std::vector<int64_t> sizes, strides;
  std::vector<T> storage;

  torch_ext::core::TensorView view() const {
    return {storage.data(), kDType<T>, static_cast<int32_t>(sizes.size()), sizes.data(),
            strides.data()};
  }
  int64_t numel() const {
    return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
  }
  // fn(index in storage, index along axis) for every element; axis -1: 0.
  template <class Fn>
  void for_each(int axis, const Fn& fn) const {
    std::vector<int64_t> at(sizes.size(), 0);
    for (int64_t left = numel(); left > 0; --left) {
      fn(std::inner_product(at.begin(), at.end(), strides.begin(), int64_t{0}),
         axis < 0 ? 0 : at[axis]);
      for (size_t d = sizes.size(); d-- > 0;) {
        if (++at[d] < sizes[d]) break;
        at[d] = 0;
      }
    }
  }
  // Adds each channel's values to its list.
  void append_to(std::vector<Values>& channels, int axis) const {
    for_each(axis, [&](int64_t i, int64_t c) { channels[c].push_back(counted(storage[i])); });
  }
};

// How the dimensions lie in memory: order, innermost first; gaps between elements; expanded ones.
struct Placement {
  std::vector<int> order;
  std::vector<int64_t> gap;  // 1: none, 0: expanded
};

inline Placement contiguous(size_t ndim) {
  Placement p{std::vector<int>(ndim), std::vector<int64_t>(ndim, 1)};
  std::iota(p.order.rbegin(), p.order.rend(), 0);
  return p;
}

inline Placement random_placement(size_t ndim, Random& random) {
  Placement p = contiguous(ndim);
  if (random() % 3 == 0) return p;
  std::shuffle(p.order.begin(), p.order.end(), random);
  for (int64_t& gap : p.gap) {
    const auto draw = random() % 8;
    gap = draw == 0 ? 0 : draw <= 2 ? between(2, 3, random) : 1;
  }
  return p;
}

// An array of values of this kind. Storage that the strides do not reach is NaN.
template <class T>
Array<T> make_array(const std::vector<int64_t>& sizes, const Placement& placement,
                    statistic_plain::Kind kind, Random& random) {
  Array<T> a{sizes, std::vector<int64_t>(sizes.size()), {}};
  int64_t extent = 1;
  for (const int d : placement.order) {
    a.strides[d] = extent * placement.gap[d];
    if (placement.gap[d] != 0) extent *= std::max<int64_t>(sizes[d], 1) * placement.gap[d];
  }
  T poison;
  store(std::numeric_limits<float>::quiet_NaN(), poison);
  a.storage.assign(extent, poison);
  bool first = true;
  a.for_each(-1, [&](int64_t i, int64_t) {
    store(statistic_plain::value_of(kind, random, first), a.storage[i]);
    first = false;
  });
  return a;
}

// 0 to 4 dimensions, at most `max_elements` elements.
inline std::vector<int64_t> random_sizes(int64_t max_elements, Random& random) {
  std::vector<int64_t> sizes(between(0, 4, random));
  for (int64_t& size : sizes) {
    const auto draw = random() % 10;
    size = draw == 0   ? 0
           : draw == 1 ? 1
           : draw <= 7 ? between(2, 9, random)
                       : between(10, max_elements, random);
  }
  int64_t numel = 1;
  for (int64_t& size : sizes) {
    size = std::min(size, std::max<int64_t>(1, max_elements / numel));
    numel *= std::max<int64_t>(1, size);
  }
  std::shuffle(sizes.begin(), sizes.end(), random);
  return sizes;
}

}  // namespace arrays
