#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/driver.h"
#include "cpu/kernels.h"
#include "parallel_threads.h"
#include "registry.h"
#include "statistic_plain.h"
#include "view_plain.h"

// Rules called by name, through the driver or through one instruction set's inner loops.
namespace solving {

using statistic_plain::Memory;
using statistic_plain::Values;
using torch_ext::core::Grid;
using torch_ext::core::HistogramLayout;
using torch_ext::core::ScaleRule;

constexpr Grid kInt8{{-128, 127}, true, ScaleRule::grid, false};
constexpr Grid kInt8Narrow{{-127, 127}, true, ScaleRule::grid, false};
constexpr Grid kInt4{{-8, 7}, true, ScaleRule::grid, false};
constexpr Grid kInt2{{-2, 1}, true, ScaleRule::grid, false};
constexpr Grid kTernary{{-1, 1}, true, ScaleRule::grid, false};
constexpr Grid kUint8{{0, 255}, true, ScaleRule::grid, false};
constexpr Grid kUint4{{0, 15}, true, ScaleRule::grid, false};
constexpr Grid kInt8Affine{{-128, 127}, false, ScaleRule::grid, false};
constexpr Grid kUint8Affine{{0, 255}, false, ScaleRule::grid, false};
constexpr Grid kUint4Affine{{0, 15}, false, ScaleRule::grid, false};
constexpr Grid kInt8PowerOfTwo{{-128, 127}, true, ScaleRule::grid, true};
constexpr Grid kInt8Tvm{{-128, 127}, true, ScaleRule::tvm, false};
constexpr Grid float_grid(int format, bool power_of_two = false) {
  const torch_ext::core::FloatFormat& f = torch_ext::core::kFloatFormats[format].format;
  const auto end = static_cast<int32_t>(f.largest);
  return {{-end, end, f}, true, ScaleRule::grid, power_of_two};
}
// In the order of core::kFloatFormats.
constexpr Grid kFloatGrids[] = {float_grid(0), float_grid(1), float_grid(2),
                                float_grid(3), float_grid(4), float_grid(0, true)};

constexpr Grid kGrids[] = {kInt8,       kInt8Narrow,  kInt4,        kUint8,          kUint4,
                           kInt8Affine, kUint8Affine, kUint4Affine, kInt8PowerOfTwo, kInt8Tvm};

template <class R>
int32_t index_of() {
  int32_t index_of_rule = -1;
  torch_ext::Observers::for_each([&]<class Other>(int32_t index) {
    if (std::string(Other::name) == R::name) index_of_rule = index;
  });
  return index_of_rule;
}

template <class R>
std::vector<double> defaults() {
  std::vector<double> values;
  for (int32_t i = 0; i < R::option_count; ++i) values.push_back(R::options[i].value);
  return values;
}

// What the driver writes for every channel.
struct Solved {
  std::vector<float> range, scale;
  std::vector<int32_t> zero_point;

  friend bool operator==(const Solved& a, const Solved& b) {
    const auto same = [](const std::vector<float>& x, const std::vector<float>& y) {
      return x.size() == y.size() && std::memcmp(x.data(), y.data(), 4 * x.size()) == 0;
    };
    return same(a.range, b.range) && same(a.scale, b.scale) && a.zero_point == b.zero_point;
  }
};

template <class R>
Solved solve(Memory& memory, const Grid& grid, const std::vector<double>& options = defaults<R>()) {
  const int64_t channels = memory.channels();
  Solved out{std::vector<float>(2 * channels), std::vector<float>(channels),
             std::vector<int32_t>(channels)};
  const torch_ext::core::SolveJob job{index_of<R>(),
                                      grid,
                                      options.data(),
                                      memory.raw(),
                                      out.range.data(),
                                      out.scale.data(),
                                      out.zero_point.data(),
                                      nullptr,
                                      1};
  torch_ext::cpu::solve(&job, 1);
  return out;
}

inline void observe(const Values& values, Memory& into) {
  const auto n = static_cast<int64_t>(values.size());
  const int64_t stride = 1;
  torch_ext::cpu::observe({values.data(), torch_ext::core::DType::f32, 1, &n, &stride}, -1,
                          into.raw());
}

inline Memory observed(const Values& values, HistogramLayout layout = torch_ext::core::kPerTensor) {
  Memory memory(1, layout);
  observe(values, memory);
  return memory;
}

// A search by one instruction set.
struct Searched {
  std::vector<double> objectives;
  double threshold;
};

template <class R>
Searched search(const torch_ext::cpu::SolveKernels& kernels, const torch_ext::core::View& view,
                const Grid& grid, const std::vector<double>& options = defaults<R>(),
                bool bounded = false) {
  std::vector<int64_t> words(R::search_words(view.layout, grid, options.data()));
  torch_ext::cpu::SearchStorage storage;
  const int32_t rule = index_of<R>();
  const int64_t count = kernels.prepare(rule, view, grid, options.data(), words.data(), &storage);
  Searched searched{std::vector<double>(count), 0};
  const double bound = bounded ? kernels.bound(rule, storage, searched.objectives.data())
                               : std::numeric_limits<double>::infinity();
  // In pieces, as threads do it.
  for (int64_t begin = 0; begin < count; begin += 37)
    kernels.objectives(rule, storage, begin, std::min<int64_t>(begin + 37, count), bound,
                       searched.objectives.data());
  searched.threshold = kernels.threshold(rule, view, storage, searched.objectives.data());
  return searched;
}

}  // namespace solving
