#include "cpu/dynamic.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "arrays.h"
#include "machines.h"
#include "mutations.h"
#include "solving.h"

// The kernels of dynamic.cu, run on the host, against the CPU's, which tests/core compares with the
// functions of core.
namespace {

using namespace torch_ext;
using core::DynamicJob;
using core::Grid;
using core::Rounding;
using core::ScaleRule;
using statistic_plain::Random;

template <class T>
class Dynamic : public testing::Test {};
using Types = testing::Types<float, double, core::half, core::bfloat16>;
TYPED_TEST_SUITE(Dynamic, Types);

template <class T>
struct alignas(16) Packet {
  T values[16 / sizeof(T)];
};

// Values that begin at a multiple of 16 bytes, or one element later.
template <class T>
struct Aligned {
  explicit Aligned(int64_t n, bool shifted = false)
      : memory((n * sizeof(T)) / 16 + 3), shift(shifted ? 1 : 0) {
    std::memset(static_cast<void*>(memory.data()), 0x5a, memory.size() * 16);
  }
  T* data() { return memory.data()->values + shift; }
  const T* data() const { return memory.data()->values + shift; }
  std::vector<Packet<T>> memory;
  int shift;
};

Grid with(Grid grid, ScaleRule rule) {
  grid.scale_rule = rule;
  return grid;
}

std::vector<Grid> grids() {
  std::vector<Grid> all(std::begin(solving::kGrids), std::end(solving::kGrids));
  for (const Grid& grid : {solving::kFloatGrids[0], solving::kFloatGrids[4]})
    for (const ScaleRule rule : {ScaleRule::grid, ScaleRule::floor, ScaleRule::even})
      all.push_back(with(grid, rule));
  all.push_back(solving::kFloatGrids[4]);
  all.back().scale_format = core::format_named("float8_e4m3")->format;
  return all;
}

constexpr float kTensorScale = 0.01f;

template <class T>
struct Written {
  Written(int64_t n, bool shifted) : out(n, shifted), mask((n + 7) / 8 + 16, 0x5a) {}
  DynamicJob job(const T* x, int64_t groups, int64_t group_size, const Grid& grid, bool masked,
                 Rounding rounding = Rounding::half_even) {
    return {x,
            out.data(),
            masked ? mask.data() : nullptr,
            groups,
            group_size,
            grid,
            rounding,
            grid.has_tensor_scale() ? &kTensorScale : nullptr};
  }
  Aligned<T> out;
  std::vector<uint8_t> mask;
};

template <class T>
bool is_nan(T x) {
  return std::isnan(core::widen(x));
}

void on_device(core::DType dtype, const DynamicJob& job) {
  machines::Scratch scratch(cuda::dynamic_scratch(job));
  cuda::dynamic_fake_quant(dtype, job, scratch.data(), nullptr);
}

TYPED_TEST(Dynamic, IsTheCpus) {
  using T = TypeParam;
  Random random(31);
  struct Size {
    int64_t groups, group_size;
  };
  const std::vector<Grid> all = grids();
  int trial = 0;
  for (const Size& size : {Size{1, 8},
                           {5, 16},
                           {70, 32},
                           {9, 64},
                           {3, 256},
                           {45, 24},
                           {30, 40},
                           {9, 96},
                           {3, 264},
                           {2, 4096},
                           {5, 5},
                           {3, 100},
                           {17, 1},
                           {2, 20000},
                           {1, 3001}})
    for (const bool shifted : {false, true})
      for (const Grid& grid : all) {
        ++trial;
        if (size.groups * size.group_size > 200 && trial % 7 != 0) continue;
        gpu::emulation::machine() = machines::kMachines[trial % 5];
        gpu::emulation::machine().seed = trial;
        const int64_t n = size.groups * size.group_size;
        Aligned<T> x(n, shifted);
        for (int64_t i = 0; i < n; ++i) {
          float v = static_cast<float>(std::normal_distribution<double>(0, 3)(random));
          const auto draw = random() % 400;
          if (i / size.group_size % 2 == 1 && draw == 0) v = NAN;
          if (i / size.group_size % 2 == 1 && draw == 1) v = -INFINITY;
          if (draw == 3) v = -0.0f;
          arrays::store(v, x.data()[i]);
        }
        const Rounding rounding = trial % 5 == 0 ? Rounding::half_away : Rounding::half_even;
        Written<T> have(n, shifted), want(n, shifted);
        const bool masked = trial % 3 != 0;
        on_device(arrays::kDType<T>,
                  have.job(x.data(), size.groups, size.group_size, grid, masked, rounding));
        cpu::dynamic_fake_quant(arrays::kDType<T>, want.job(x.data(), size.groups, size.group_size,
                                                            grid, masked, rounding));
        for (int64_t i = 0; i < n; ++i) {
          const T a = have.out.data()[i], b = want.out.data()[i];
          ASSERT_TRUE(std::memcmp(&a, &b, sizeof a) == 0 || (is_nan(a) && is_nan(b)))
              << size.groups << "x" << size.group_size << " element " << i;
        }
        const T *end = have.out.data() + n, *other = want.out.data() + n;
        ASSERT_EQ(std::memcmp(end, other, sizeof(T)), 0) << "written past the end";
        ASSERT_EQ(have.mask, want.mask) << size.groups << "x" << size.group_size;
      }
}

TEST(DynamicQParams, AnInvalidTensorScaleGivesNan) {
  const Grid grid = grids().back();
  for (const float bad : {0.0f, -1.0f, NAN, INFINITY, 1e-38f}) {
    for (const int64_t group_size : {16, 264, 3}) {
      Aligned<float> x(group_size);
      for (int64_t i = 0; i < group_size; ++i) x.data()[i] = 1;
      Written<float> run(group_size, false);
      DynamicJob job = run.job(x.data(), 1, group_size, grid, false);
      job.tensor_scale = &bad;
      on_device(core::DType::f32, job);
      for (int64_t i = 0; i < group_size; ++i) ASSERT_TRUE(std::isnan(run.out.data()[i])) << bad;
    }
    const float range[] = {-1, 1};
    float scale = 0;
    int32_t zero_point = 0;
    cuda::qparams(range, 1, grid, &bad, &scale, &zero_point, nullptr);
    EXPECT_TRUE(std::isnan(scale));
  }
}

TEST(DynamicBarriers, AreNeeded) {
  constexpr int64_t kGroups = 5, kSize = 4104;
  Aligned<float> x(kGroups * kSize);
  for (int64_t i = 0; i < kGroups * kSize; ++i)
    x.data()[i] = std::sin(static_cast<float>(i)) * static_cast<float>(1 + i / kSize);
  Written<float> want(kGroups * kSize, false);
  cpu::dynamic_fake_quant(core::DType::f32,
                          want.job(x.data(), kGroups, kSize, solving::kInt8Affine, true));
  mutations::expect_barriers_are_needed(0, [&] {
    mutations::machine().processors = 2;
    Written<float> have(kGroups * kSize, false);
    on_device(core::DType::f32, have.job(x.data(), kGroups, kSize, solving::kInt8Affine, true));
    return std::memcmp(have.out.data(), want.out.data(), kGroups * kSize * sizeof(float)) == 0;
  });
}

}  // namespace
