#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/map.h"
#include "map_values.h"

namespace {

using namespace mapped;

template <typename T>
class MapPieces : public testing::Test {};
TYPED_TEST_SUITE(MapPieces, Types);

// As threads do it: pieces that begin anywhere in a row. x and out begin anywhere too.
TYPED_TEST(MapPieces, PiecesAndUnalignedDataGiveTheSame) {
  using T = TypeParam;
  constexpr int64_t kShift = 1;
  for (const ChannelLayout& layout :
       {ChannelLayout{1, 1, 5000}, {3, 7, 241}, {2, 1500, 3}, {5, 1030, 1}, {700, 9, 1}}) {
    const int64_t n = layout.numel();
    const std::vector<T> x = values<T>(n);
    std::vector<T> moved(n + kShift);
    std::copy(x.begin(), x.end(), moved.begin() + kShift);
    const QParamsOf q = qparams_of(layout.channels);
    for (auto set = cpu::runnable_kernels(); *set != nullptr; ++set) {
      Output<T> shifted(n + kShift), y(n);
      const MapTask task{moved.data() + kShift,
                         shifted.out.data() + kShift,
                         y.mask.data(),
                         layout,
                         q.scale.data(),
                         q.zero_point.data(),
                         {-128, 127},
                         Rounding::half_even,
                         Mask::rounded,
                         kFakeQuant,
                         false};
      for (int64_t at = 0; at < n; at += cpu::kMapBlock)
        (*set)->map.forward[static_cast<int>(kDType<T>)](task, at,
                                                         std::min(at + cpu::kMapBlock, n));
      std::copy_n(shifted.out.begin() + kShift, n, y.out.begin());
      expect_reference(x, y, layout, q, Rounding::half_even, Mask::rounded, (*set)->name);
      if (testing::Test::HasFatalFailure()) return;
      const T* const before = shifted.out.data();
      const uint8_t* const guard = reinterpret_cast<const uint8_t*>(before);
      for (size_t i = 0; i < kShift * sizeof(T); ++i) ASSERT_EQ(guard[i], kGuard);
      const uint8_t* const after = reinterpret_cast<const uint8_t*>(before + kShift + n);
      for (size_t i = 0; i < 32; ++i) ASSERT_EQ(after[i], kGuard);
    }
  }
}

// From 16 MiB on outputs are written past the caches, if they begin with a cache line.
TYPED_TEST(MapPieces, LargeOutputsEqualTheFormula) {
  using T = TypeParam;
  using C = core::compute_t<T>;
  const int64_t large = (16 << 20) / sizeof(T);
  const std::vector<T> some = values<T>(4999);
  std::vector<T> x;
  for (int64_t i = 0; i < large + 1; ++i) x.push_back(some[i % some.size()]);
  const float scale = 0.03f;
  const int32_t zero_point = 5;
  // Of a NaN, the payload is free.
  const auto grid = core::make_unit_grid<C>(scale, zero_point, {-128, 127});
  std::vector<T> want;
  for (const T& v : some)
    want.push_back(core::narrow<T>(core::dequantize(core::quantize(core::widen(v), grid), grid)));
  for (const int64_t n : {large - 1, large, large + 1})
    for (const int64_t shift : {0, 1}) {
      Output<T> y(n + shift);
      T* const out = y.out.data() + shift;
      cpu::fake_quant_forward(kDType<T>, {x.data(),
                                          out,
                                          y.mask.data(),
                                          {1, 1, n},
                                          &scale,
                                          &zero_point,
                                          {-128, 127},
                                          Rounding::half_even,
                                          Mask::rounded});
      int64_t wrong = 0, wrong_bits = 0;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = i % static_cast<int64_t>(some.size());
        wrong += std::memcmp(&out[i], &want[at], sizeof(T)) != 0 &&
                 !(std::isnan(value_of(out[i])) && std::isnan(value_of(want[at])));
        wrong_bits +=
            bit(y.mask, i) != core::is_in_mask(core::widen(some[at]), grid, Mask::rounded);
      }
      EXPECT_EQ(wrong, 0) << n << " " << shift;
      EXPECT_EQ(wrong_bits, 0) << n << " " << shift;
    }
}

}  // namespace
