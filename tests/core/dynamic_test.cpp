#include "cpu/dynamic.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/qparams.h"
#include "map_values.h"
#include "parallel_threads.h"
#include "solving.h"

// Fake-quant with the scales of the values themselves.
namespace {

using namespace mapped;
using core::DynamicJob;
using core::Grid;
using core::QParams;
using core::ScaleRule;

template <typename T>
class Dynamic : public testing::Test {};
TYPED_TEST_SUITE(Dynamic, Types);

Grid with(Grid grid, ScaleRule rule, bool power_of_two = false) {
  grid.scale_rule = rule;
  grid.power_of_two = power_of_two;
  return grid;
}

std::vector<Grid> grids() {
  std::vector<Grid> all(std::begin(solving::kGrids), std::end(solving::kGrids));
  all.push_back(with(solving::kInt8, ScaleRule::floor));
  all.push_back(with(solving::kUint8, ScaleRule::floor));
  for (const Grid& grid : solving::kFloatGrids) {
    all.push_back(grid);
    all.push_back(with(grid, ScaleRule::floor));
    all.push_back(with(grid, ScaleRule::even));
    all.push_back(with(grid, ScaleRule::grid, true));
    all.push_back(grid);
    all.back().power_of_two = false;
    all.back().scale_format = core::format_named("float8_e4m3")->format;
  }
  return all;
}

TEST(DynamicScales, AreThoseOfCore) {
  std::vector<float> bounds = {0,        0x1p-149f, 0x1p-126f, std::numeric_limits<float>::max(),
                               INFINITY, NAN};
  std::mt19937 random(3);
  while (bounds.size() < 5001) {
    const float v = std::bit_cast<float>(static_cast<uint32_t>(random()) & 0x7fffffffu);
    bounds.push_back(v);
  }
  std::vector<float> scales(bounds.size());
  const float tensor_scale = 0.37f;
  for (const Grid& grid : grids()) {
    if (!grid.symmetric) continue;
    for (auto set = cpu::runnable_kernels(); *set != nullptr; ++set) {
      (*set)->dynamic.scales(grid, tensor_scale, bounds.data(), static_cast<int64_t>(bounds.size()),
                             scales.data());
      for (size_t i = 0; i < bounds.size(); ++i) {
        const float want = core::qparams({-bounds[i], bounds[i]}, grid, tensor_scale).scale;
        ASSERT_TRUE(same(scales[i], want) || (std::isnan(scales[i]) && std::isnan(want)))
            << (*set)->name << " " << bounds[i] << ": " << scales[i] << " for " << want;
      }
    }
  }
}

const int64_t kSizes[] = {1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 64, 100, 128, 144, 200, 1000};

TYPED_TEST(Dynamic, ExtremaAreFoundByEveryInstructionSet) {
  using T = TypeParam;
  const int dtype = static_cast<int>(kDType<T>);
  for (const int64_t n : kSizes)
    for (const int64_t rows : {1, 15, 16, 37}) {
      std::vector<T> x;
      std::mt19937 random(static_cast<unsigned>(n * rows));
      // Of several groups one is not finite.
      const std::vector<T> pool = values<T>(61 * 67);
      for (int64_t i = 0; i < n * rows; ++i) {
        T v = pool[random() % pool.size()];
        if (i / n % 3 != 1 && !std::isfinite(value_of(v))) v = pool[0];
        x.push_back(v);
      }
      std::vector<float> bounds(rows + 1, 77), least(rows + 1, 77), most(rows + 1, 77);
      for (auto set = cpu::runnable_kernels(); *set != nullptr; ++set) {
        (*set)->dynamic.bounds[dtype](x.data(), n, rows, bounds.data());
        (*set)->dynamic.extrema[dtype](x.data(), n, rows, least.data(), most.data());
        for (int64_t r = 0; r < rows; ++r) {
          float lo = INFINITY, hi = -INFINITY, bound = 0;
          bool finite = true;
          for (int64_t i = r * n; i < (r + 1) * n; ++i) {
            const float v = value_of(x[i]);
            finite = finite && std::isfinite(v);
            lo = std::fmin(lo, v);
            hi = std::fmax(hi, v);
            bound = std::fmax(bound, std::fabs(v));
          }
          const std::string where =
              std::string((*set)->name) + " row " + std::to_string(r) + " of " + std::to_string(n);
          ASSERT_EQ(std::isfinite(bounds[r]), finite) << where;
          ASSERT_EQ(std::isfinite(least[r]) && std::isfinite(most[r]), finite) << where;
          if (!finite) continue;
          ASSERT_EQ(bounds[r], bound) << where;
          ASSERT_EQ(least[r], lo) << where;
          ASSERT_EQ(most[r], hi) << where;
        }
        ASSERT_EQ(bounds[rows] + least[rows] + most[rows], 3 * 77.0f) << "written past the end";
      }
    }
}

TYPED_TEST(Dynamic, EveryInstructionSetMapsAsStaticFakeQuantDoes) {
  using T = TypeParam;
  const int dtype = static_cast<int>(kDType<T>);
  const core::Codes all_codes[] = {{-128, 127}, solving::kFloatGrids[0], solving::kFloatGrids[4]};
  for (const int64_t n : {16, 32, 48, 256})
    for (const core::Codes& codes : all_codes) {
      const ChannelLayout layout{1, 21, n};
      QParamsOf q = qparams_of(layout.channels);
      q.scale[5] = NAN;
      const bool offsets = !codes.is_float();
      const std::vector<T> x = values<T>(layout.numel());
      for (auto set = cpu::runnable_kernels(); *set != nullptr; ++set)
        for (const bool stream : {false, true}) {
          Output<T> have(layout.numel()), want(layout.numel());
          MapTask task{x.data(),
                       have.out.data(),
                       have.mask.data(),
                       layout,
                       q.scale.data(),
                       offsets ? q.zero_point.data() : nullptr,
                       codes,
                       Rounding::half_even,
                       Mask::rounded,
                       kFakeQuant,
                       stream};
          (*set)->dynamic.map[dtype](task, 1 << 12);
          MapTask plain = task;
          plain.out = want.out.data();
          plain.mask = want.mask.data();
          plain.stream = false;
          (*set)->map.forward[dtype](plain, 0, layout.numel());
          ASSERT_EQ(std::memcmp(have.out.data(), want.out.data(), have.out.size() * sizeof(T)), 0)
              << (*set)->name << " " << n;
          ASSERT_EQ(have.mask, want.mask) << (*set)->name << " " << n;
          Output<T> unmasked(layout.numel());
          task.out = unmasked.out.data();
          task.mask = nullptr;
          (*set)->dynamic.map[dtype](task, 0);
          ASSERT_EQ(std::memcmp(unmasked.out.data(), want.out.data(), have.out.size() * sizeof(T)),
                    0);
        }
    }
}

// Each group alone, by the functions of core.
template <typename T>
void expect_groups(const std::vector<T>& x, const Output<T>& y, const DynamicJob& job,
                   const std::string& where) {
  using C = core::compute_t<T>;
  for (int64_t g = 0; g < job.groups; ++g) {
    core::Range range{INFINITY, -INFINITY};
    bool finite = true;
    for (int64_t i = g * job.group_size; i < (g + 1) * job.group_size; ++i) {
      const float v = value_of(x[i]);
      finite = finite && std::isfinite(v);
      range.lo = std::fmin(range.lo, v);
      range.hi = std::fmax(range.hi, v);
    }
    const float unit = job.tensor_scale == nullptr ? 0 : *job.tensor_scale;
    const QParams q = core::qparams(range, job.grid, unit);
    const auto grid = core::make_unit_grid<C>(finite ? q.scale : NAN, finite ? q.zero_point : 0,
                                              job.grid, job.rounding);
    for (int64_t i = g * job.group_size; i < (g + 1) * job.group_size; ++i) {
      const C v = core::widen(x[i]);
      const T want = core::narrow<T>(core::dequantize(core::quantize(v, grid), grid));
      const std::string at = where + " element " + std::to_string(i);
      if (std::isnan(value_of(want))) {
        ASSERT_TRUE(std::isnan(value_of(y.out[i]))) << at;
      } else {
        ASSERT_EQ(std::memcmp(&y.out[i], &want, sizeof want), 0) << at;
      }
      ASSERT_EQ(bit(y.mask, i), core::is_in_mask(v, grid, Mask::rounded)) << at;
    }
  }
  ASSERT_TRUE(y.guards_hold(job.groups * job.group_size)) << where;
}

TYPED_TEST(Dynamic, EachGroupHasItsOwnScaleForAnyNumberOfThreads) {
  using T = TypeParam;
  const int64_t threads = cpu::test_threads();
  const float tensor_scale = 0.01f;
  struct Size {
    int64_t groups, group_size;
  };
  int trial = 0;
  for (const Size& size : {Size{1, 1},
                           {7, 3},
                           {1000, 1},
                           {300, 16},
                           {2049, 32},
                           {40, 48},
                           {9, 1000},
                           {3, 9001},
                           {5, 16384},
                           {2, 140000},
                           {1, 300007}})
    for (const Grid& grid : grids()) {
      const int64_t n = size.groups * size.group_size;
      if (n > 4000 && ++trial % 5 != 0) continue;
      std::vector<T> x = values<T>(n);
      // Values that are not finite in a third of the groups alone.
      for (int64_t i = 0; i < n; ++i)
        if (i / size.group_size % 3 != 1 && !std::isfinite(value_of(x[i]))) x[i] = x[0];
      Output<T> first(n);
      for (const int64_t count : {1, 2, 7}) {
        cpu::test_threads() = count;
        Output<T> y(n);
        const DynamicJob job{x.data(),
                             y.out.data(),
                             y.mask.data(),
                             size.groups,
                             size.group_size,
                             grid,
                             size.groups == 40 ? Rounding::half_away : Rounding::half_even,
                             grid.has_tensor_scale() ? &tensor_scale : nullptr};
        cpu::dynamic_fake_quant(kDType<T>, job);
        if (count == 1) {
          first = y;
          expect_groups(x, y, job,
                        std::to_string(size.groups) + "x" + std::to_string(size.group_size));
        }
        ASSERT_EQ(std::memcmp(y.out.data(), first.out.data(), y.out.size() * sizeof(T)), 0);
        ASSERT_EQ(y.mask, first.mask);
        if (testing::Test::HasFatalFailure()) return;
      }
      cpu::test_threads() = threads;
    }
}

}  // namespace
