#include "cpu/map.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "core/half.h"
#include "cpu/kernels.h"
#include "parallel_threads.h"
#include "unit_grid_plain.h"

namespace {

using namespace torch_ext;
using core::bfloat16;
using core::ChannelLayout;
using core::DType;
using core::half;
using core::Mask;
using core::Rounding;
using cpu::MapTask;

constexpr Rounding kRoundings[] = {Rounding::half_even, Rounding::half_away,
                                   Rounding::floor_half_up};
constexpr Mask kMasks[] = {Mask::rounded, Mask::paper};
constexpr int32_t kFakeQuant = -1;  // no learned parameter
constexpr uint8_t kGuard = 0xa5;

template <typename T>
constexpr DType kDType = DType::f32;
template <>
constexpr DType kDType<double> = DType::f64;
template <>
constexpr DType kDType<half> = DType::f16;
template <>
constexpr DType kDType<bfloat16> = DType::bf16;

struct QParamsOf {
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
};

// Different for every channel.
QParamsOf qparams_of(int64_t channels) {
  QParamsOf q;
  for (int64_t c = 0; c < channels; ++c) {
    q.scale.push_back(0.01f + 0.003f * static_cast<float>(c % 101));
    q.zero_point.push_back(static_cast<int32_t>(c * 7 % 41) - 20);
  }
  return q;
}

// Values on both sides of the grid's ends, some on ties, some not finite.
template <typename T>
std::vector<T> values(int64_t n) {
  std::mt19937 random(static_cast<unsigned>(n) + 1);
  std::uniform_real_distribution<float> uniform(-6, 6);
  std::vector<T> x;
  for (int64_t i = 0; i < n; ++i) {
    float v = uniform(random);
    if (i % 17 == 3) v = std::ldexp(std::round(v * 8), -4);
    if (i % 61 == 5) v = i % 2 == 0 ? INFINITY : -INFINITY;
    if (i % 67 == 6) v = NAN;
    if (i % 71 == 8) v = -0.0f;
    if constexpr (std::is_same_v<T, half>)
      x.push_back({plain::encode(v, plain::kHalf)});
    else if constexpr (std::is_same_v<T, bfloat16>)
      x.push_back({plain::encode(v, plain::kBfloat16)});
    else
      x.push_back(static_cast<T>(v));
  }
  return x;
}

float value_of(float x) { return x; }
float value_of(double x) { return static_cast<float>(x); }
float value_of(half x) { return static_cast<float>(plain::decode(x.bits, plain::kHalf)); }
float value_of(bfloat16 x) { return static_cast<float>(plain::decode(x.bits, plain::kBfloat16)); }

bool same(float have, float want) { return std::memcmp(&have, &want, sizeof want) == 0; }
bool same(half have, float want) { return have.bits == plain::encode(want, plain::kHalf); }
bool same(bfloat16 have, float want) { return have.bits == plain::encode(want, plain::kBfloat16); }

int count_of_sets() {
  int count = 0;
  while (cpu::runnable_kernels()[count] != nullptr) ++count;
  return count;
}

bool bit(const std::vector<uint8_t>& mask, int64_t i) { return mask[i / 8] >> (i % 8) & 1; }

// Memory that begins with a cache line, as torch's does: it can be written past the caches.
template <typename T>
struct Lines {
  using value_type = T;
  Lines() = default;
  template <typename U>
  explicit Lines(const Lines<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t{64}); }
  bool operator==(const Lines&) const { return true; }
};

// The output of a forward, with guard elements behind it.
template <typename T>
struct Output {
  explicit Output(int64_t n) : out(n + 64), mask((n + 7) / 8 + 64, kGuard) {
    std::memset(static_cast<void*>(out.data()), kGuard, out.size() * sizeof(T));
  }
  bool guards_hold(int64_t n) const {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(out.data());
    for (size_t i = n * sizeof(T); i < out.size() * sizeof(T); ++i)
      if (bytes[i] != kGuard) return false;
    for (size_t i = (n + 7) / 8; i < mask.size(); ++i)
      if (mask[i] != kGuard) return false;
    return n % 8 == 0 || mask[n / 8] >> (n % 8) == 0;
  }
  std::vector<T, Lines<T>> out;
  std::vector<uint8_t> mask;
};

template <typename T>
class MapTyped : public testing::Test {};
using Types = testing::Types<float, double, half, bfloat16>;
TYPED_TEST_SUITE(MapTyped, Types);

template <typename T>
void expect_reference(const std::vector<T>& x, const Output<T>& y, const ChannelLayout& layout,
                      const QParamsOf& q, Rounding rounding, Mask mask, const std::string& where) {
  for (int64_t i = 0; i < layout.numel(); ++i) {
    const int64_t c = i / layout.inner % layout.channels;
    const plain::Params p{q.scale[c], q.zero_point[c], -128, 127};
    const std::string at = where + " element " + std::to_string(i);
    if constexpr (std::is_same_v<T, double>) {
      const auto grid = core::make_unit_grid<double>(p.scale, p.zero_point, {-128, 127}, rounding);
      const double want = core::dequantize(core::quantize(x[i], grid), grid);
      if (std::isnan(x[i])) {
        ASSERT_TRUE(std::isnan(y.out[i])) << at;
      } else {
        ASSERT_EQ(y.out[i], want) << at;
      }
      ASSERT_EQ(bit(y.mask, i), core::is_in_mask(x[i], grid, mask)) << at;
    } else {
      const plain::Mapped want = plain::fake_quant(value_of(x[i]), p, rounding, mask);
      if (std::isnan(want.value)) {
        ASSERT_TRUE(std::isnan(value_of(y.out[i]))) << at;
      } else {
        ASSERT_TRUE(same(y.out[i], want.value + 0.0f)) << at << " " << value_of(x[i]);
      }
      ASSERT_EQ(bit(y.mask, i), want.passes) << at << " " << value_of(x[i]);
    }
  }
  ASSERT_TRUE(y.guards_hold(layout.numel())) << where;
}

// Every kind of row: around the widths of registers (2 to 16 elements) and of groups (8 and 16),
// across mask bytes and blocks, with fewer and more channels than a register and than a tile (1024)
// hold.
const ChannelLayout kLayouts[] = {
    {1, 1, 1},    {1, 1, 7},    {1, 1, 8},    {1, 1, 1023}, {1, 1, 1024},  {1, 1, 1025},
    {1, 1, 5000}, {3, 1, 700},  {1, 3, 1},    {900, 3, 1},  {700, 8, 1},   {3, 1024, 1},
    {2, 1025, 1}, {2, 2500, 1}, {800, 3, 2},  {50, 16, 9},  {1, 300, 9},   {7, 20, 49},
    {2, 70, 49},  {1, 100, 63}, {3, 5, 64},   {2, 9, 65},   {2, 8, 196},   {2, 3, 1025},
    {1, 5, 1024}, {11, 1, 1},   {1, 4096, 1}, {1, 1025, 2}, {90, 2, 1},    {70, 4, 1},
    {70, 7, 1},   {70, 15, 1},  {9, 16, 1},   {9, 17, 1},   {9, 32, 1},    {9, 33, 1},
    {3, 50, 2},   {3, 50, 3},   {3, 50, 4},   {3, 50, 5},   {3, 50, 7},    {3, 50, 8},
    {3, 50, 15},  {3, 50, 16},  {3, 50, 17},  {3, 50, 31},  {3, 50, 32},   {3, 50, 33},
    {2, 1023, 3}, {2, 1024, 3}, {2, 1025, 3}, {1, 1039, 5}, {1, 1041, 17}, {1, 2100, 9},
    {5, 1025, 1}};

TYPED_TEST(MapTyped, EveryInstructionSetEqualsTheReferenceForEveryLayout) {
  using T = TypeParam;
  const int dtype = static_cast<int>(kDType<T>);
  for (const ChannelLayout& layout : kLayouts) {
    const std::vector<T> x = values<T>(layout.numel());
    const QParamsOf q = qparams_of(layout.channels);
    for (const Rounding rounding : kRoundings)
      for (const Mask mask : kMasks)
        for (auto set = cpu::runnable_kernels(); *set != nullptr; ++set) {
          const std::string where =
              std::string((*set)->name) + " [" + std::to_string(layout.outer) + "," +
              std::to_string(layout.channels) + "," + std::to_string(layout.inner) + "]";
          const int64_t n = layout.numel();
          Output<T> y(n), unmasked(n);
          MapTask task{
              x.data(), y.out.data(), y.mask.data(), layout, q.scale.data(), q.zero_point.data(),
              -128,     127,          rounding,      mask,   kFakeQuant,     false};
          (*set)->map.forward[dtype](task, 0, n);
          expect_reference(x, y, layout, q, rounding, mask, where);
          if (testing::Test::HasFatalFailure()) return;
          task.out = unmasked.out.data();
          task.mask = nullptr;
          task.stream = true;
          (*set)->map.forward[dtype](task, 0, n);
          ASSERT_EQ(std::memcmp(y.out.data(), unmasked.out.data(), y.out.size() * sizeof(T)), 0)
              << where << " without a mask, streamed";
        }
  }
}

TYPED_TEST(MapTyped, ResultsDoNotDependOnTheNumberOfThreads) {
  using T = TypeParam;
  const int64_t threads = cpu::test_threads();
  const ChannelLayout layouts[] = {{1, 1, 200001}, {9, 31, 700},  {40, 100, 49}, {70000, 3, 1},
                                   {100, 2000, 1}, {33, 1024, 3}, {33, 1025, 3}, {4, 9000, 3},
                                   {3, 9000, 3},   {1, 9001, 9},  {4, 1, 30000}, {3, 40000, 1},
                                   {4, 40000, 1}};
  for (const ChannelLayout& layout : layouts) {
    const int64_t n = layout.numel();
    const std::vector<T> x = values<T>(n);
    const QParamsOf q = qparams_of(layout.channels);
    Output<T> single(n), dx_single(n);
    for (const int64_t count : {1, 2, 3, 7}) {
      cpu::test_threads() = count;
      Output<T> y(n), dx(n);
      cpu::fake_quant_forward(kDType<T>,
                              {x.data(), y.out.data(), y.mask.data(), layout, q.scale.data(),
                               q.zero_point.data(), -128, 127, Rounding::half_even, Mask::rounded});
      cpu::fake_quant_backward(kDType<T>, x.data(), y.mask.data(), dx.out.data(), n);
      if (count == 1) {
        single = y;
        dx_single = dx;
      }
      ASSERT_EQ(std::memcmp(y.out.data(), single.out.data(), y.out.size() * sizeof(T)), 0) << count;
      ASSERT_EQ(y.mask, single.mask) << count;
      ASSERT_EQ(std::memcmp(dx.out.data(), dx_single.out.data(), dx.out.size() * sizeof(T)), 0);
      ASSERT_TRUE(y.guards_hold(n));
    }
    cpu::test_threads() = threads;
    expect_reference(x, single, layout, q, Rounding::half_even, Mask::rounded, "threads");
    if (testing::Test::HasFatalFailure()) return;
  }
}

// As threads do it: pieces that begin anywhere in a row. x and out begin anywhere too.
TYPED_TEST(MapTyped, PiecesAndUnalignedDataGiveTheSame) {
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
                         -128,
                         127,
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
TYPED_TEST(MapTyped, LargeOutputsEqualTheFormula) {
  using T = TypeParam;
  using C = core::compute_t<T>;
  const int64_t large = (16 << 20) / sizeof(T);
  const std::vector<T> some = values<T>(4999);
  std::vector<T> x;
  for (int64_t i = 0; i < large + 1; ++i) x.push_back(some[i % some.size()]);
  const float scale = 0.03f;
  const int32_t zero_point = 5;
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
                                          -128,
                                          127,
                                          Rounding::half_even,
                                          Mask::rounded});
      int64_t wrong = 0, wrong_bits = 0;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = i % static_cast<int64_t>(some.size());
        const bool both_nan = std::isnan(value_of(out[i])) && std::isnan(value_of(want[at]));
        wrong += !both_nan && std::memcmp(&out[i], &want[at], sizeof(T)) != 0;
        wrong_bits +=
            bit(y.mask, i) != core::is_in_mask(core::widen(some[at]), grid, Mask::rounded);
      }
      EXPECT_EQ(wrong, 0) << n << " " << shift;
      EXPECT_EQ(wrong_bits, 0) << n << " " << shift;
    }
}

// Gradients are copied bit by bit, NaN and infinity too; elsewhere it is +0.
TYPED_TEST(MapTyped, BackwardPassesTheGradientWhereTheBitIsSet) {
  using T = TypeParam;
  const int dtype = static_cast<int>(kDType<T>);
  for (const int64_t n : {1, 7, 8, 9, 64, 1023, 1024, 1025, 3001}) {
    const std::vector<T> grad = values<T>(n);
    std::mt19937 random(9);
    std::vector<uint8_t> mask((n + 7) / 8);
    for (uint8_t& byte : mask) byte = static_cast<uint8_t>(random());
    for (int i = 0; i < 2 * count_of_sets(); ++i) {
      const cpu::Kernels* const* set = cpu::runnable_kernels() + i / 2;
      Output<T> dx(n);
      const bool stream = i % 2 == 1;
      (*set)->map.backward[dtype](grad.data(), mask.data(), dx.out.data(), 0, n, stream);
      const T zero{};
      for (int64_t i = 0; i < n; ++i)
        ASSERT_EQ(std::memcmp(&dx.out[i], bit(mask, i) ? &grad[i] : &zero, sizeof(T)), 0)
            << (*set)->name << " " << i << " of " << n;
      for (int64_t i = n; i < n + 64; ++i) {
        T guard;
        std::memset(static_cast<void*>(&guard), kGuard, sizeof guard);
        ASSERT_EQ(std::memcmp(&dx.out[i], &guard, sizeof(T)), 0);
      }
    }
  }
}

TYPED_TEST(MapTyped, NothingIsTouchedWhereThereAreNoElements) {
  using T = TypeParam;
  Output<T> y(0);
  const std::vector<T> x(1);
  for (const ChannelLayout& layout : {ChannelLayout{0, 3, 4}, {2, 0, 4}, {2, 3, 0}})
    cpu::fake_quant_forward(kDType<T>, {x.data(), y.out.data(), y.mask.data(), layout, nullptr,
                                        nullptr, -128, 127, Rounding::half_even, Mask::rounded});
  cpu::fake_quant_backward(kDType<T>, x.data(), y.mask.data(), y.out.data(), 0);
  EXPECT_TRUE(y.guards_hold(0));
}

TYPED_TEST(MapTyped, AnInvalidScaleGivesNanInItsChannelOnly) {
  using T = TypeParam;
  const float scale[] = {0.1f, 0.0f, -1.0f, INFINITY, NAN};
  const int32_t zero_point[] = {0, 0, 0, 0, 0};
  for (const int64_t inner : {1, 20, 100}) {
    const ChannelLayout layout{30, 5, inner};
    const int64_t n = layout.numel();
    const std::vector<T> x(n);
    Output<T> y(n);
    cpu::fake_quant_forward(kDType<T>, {x.data(), y.out.data(), y.mask.data(), layout, scale,
                                        zero_point, -128, 127, Rounding::half_even, Mask::rounded});
    for (int64_t i = 0; i < n; ++i) {
      ASSERT_EQ(std::isnan(value_of(y.out[i])), i / inner % 5 != 0) << i;
      ASSERT_EQ(bit(y.mask, i), i / inner % 5 == 0) << i;
    }
  }
}

template <typename T, size_t n>
std::vector<uint8_t> mask_of(const T (&x)[n], Mask kind) {
  Output<T> y(n);
  const float scale = 1;
  const int32_t zero_point = 0;
  cpu::fake_quant_forward(kDType<T>, {x,
                                      y.out.data(),
                                      y.mask.data(),
                                      {1, 1, n},
                                      &scale,
                                      &zero_point,
                                      -128,
                                      127,
                                      Rounding::half_even,
                                      kind});
  return {y.mask.begin(), y.mask.begin() + (n + 7) / 8};
}

// Element i is bit i % 8 of byte i / 8, the unused bits are 0.
TEST(Map, MaskLayout) {
  const float x[] = {-200, -128.4f, -1.5f,  -0.5f,  0.2f,   0.5f,
                     1.5f, 2.5f,    126.6f, 127.4f, 127.6f, 300};
  EXPECT_EQ(mask_of(x, Mask::rounded), (std::vector<uint8_t>{0xfe, 0x03}));
  EXPECT_EQ(mask_of(x, Mask::paper), (std::vector<uint8_t>{0xfc, 0x01}));
  const double zero[] = {0.0};
  EXPECT_EQ(mask_of(zero, Mask::rounded), (std::vector<uint8_t>{0x01}));
}

// All 2^16 inputs of a 16-bit type.
template <typename T>
void exhaust(plain::Format format) {
  std::vector<T> x(1 << 16);
  for (int i = 0; i < 1 << 16; ++i) x[i].bits = static_cast<uint16_t>(i);
  const plain::Params params[] = {
      {1, 0, -128, 127},           {0.1f, 0, -127, 127},        {0.0115294f, 3, -128, 127},
      {0x1p-24f, 1, -128, 127},    {0x1p-126f, -7, -8, 7},      {511.97f, 0, -128, 127},
      {700, -128, -128, 127},      {1e36f, 0, -128, 127},       {0.75f, 85, 0, 255},
      {3e-5f, 32768, 0, 65535},    {1.9999f, 0, -32768, 32767}, {0x1.fffffep120f, 0, -128, 127},
      {0x1.fffffep127f, 0, 0, 255}};
  std::vector<float> value(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    value[i] = static_cast<float>(plain::decode(x[i].bits, format));
  for (const plain::Params& p : params)
    for (const Rounding rounding : kRoundings)
      for (const Mask mask : kMasks) {
        std::vector<Output<T>> outputs;
        for (auto set = cpu::runnable_kernels(); *set != nullptr; ++set) {
          outputs.emplace_back(1 << 16);
          const MapTask task{x.data(),
                             outputs.back().out.data(),
                             outputs.back().mask.data(),
                             {1, 1, 1 << 16},
                             &p.scale,
                             &p.zero_point,
                             p.quant_min,
                             p.quant_max,
                             rounding,
                             mask,
                             kFakeQuant,
                             false};
          (*set)->map.forward[static_cast<int>(kDType<T>)](task, 0, 1 << 16);
        }
        for (int i = 0; i < 1 << 16; ++i) {
          const plain::Mapped want = plain::fake_quant(value[i], p, rounding, mask);
          const uint16_t bits = plain::encode(want.value + 0.0f, format);
          for (const Output<T>& y : outputs) {
            ASSERT_EQ(y.out[i].bits, bits) << value[i] << " scale " << p.scale;
            ASSERT_EQ(bit(y.mask, i), want.passes) << value[i] << " scale " << p.scale;
          }
          // No finite input gives an infinite output, whatever the scale.
          const bool finite = std::isfinite(static_cast<float>(plain::decode(bits, format)));
          ASSERT_TRUE(finite || std::isnan(value[i]));
        }
      }
}

TEST(Map, EveryHalfEqualsTheReference) { exhaust<half>(plain::kHalf); }
TEST(Map, EveryBfloat16EqualsTheReference) { exhaust<bfloat16>(plain::kBfloat16); }

TEST(Map, HostileFloatsEqualTheReferenceOnEveryInstructionSet) {
  const plain::Params params[] = {{0.1f, 3, -128, 127},
                                  {0x1p-126f, 0, -128, 127},
                                  {0x1.fffffep120f, 0, -128, 127},
                                  {3e-5f, 32768, 0, 65535},
                                  {1 / 3.0f, -1, -8, 7}};
  for (const plain::Params& p : params) {
    const std::vector<float> x = plain::hostile_floats(p);
    const int64_t n = static_cast<int64_t>(x.size());
    for (const Rounding rounding : kRoundings)
      for (const Mask mask : kMasks)
        for (auto set = cpu::runnable_kernels(); *set != nullptr; ++set) {
          Output<float> y(n);
          const MapTask task{x.data(), y.out.data(),  y.mask.data(), {1, 1, n},
                             &p.scale, &p.zero_point, p.quant_min,   p.quant_max,
                             rounding, mask,          kFakeQuant,    false};
          (*set)->map.forward[0](task, 0, n);
          for (int64_t i = 0; i < n; ++i) {
            const plain::Mapped want = plain::fake_quant(x[i], p, rounding, mask);
            if (std::isnan(x[i])) {
              ASSERT_TRUE(std::isnan(y.out[i]));
            } else {
              ASSERT_TRUE(same(y.out[i], want.value + 0.0f)) << (*set)->name << " " << x[i];
              ASSERT_TRUE(std::isfinite(y.out[i]));
            }
            ASSERT_EQ(bit(y.mask, i), want.passes) << (*set)->name << " " << x[i];
          }
        }
  }
}

}  // namespace
