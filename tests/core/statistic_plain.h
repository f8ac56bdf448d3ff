#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/job.h"

// Statistics by their definition: the values themselves are kept, and counted one at a time with
// frexp and ldexp.
namespace statistic_plain {

using torch_ext::core::ChannelStatistic;
using torch_ext::core::HistogramLayout;
using torch_ext::core::kTallyColumns;
using Values = std::vector<float>;
using Random = std::mt19937_64;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kLeastExponent = -126;  // of a normal float32

// One channel.
struct State {
  float min = kInfinity, max = -kInfinity;
  std::array<int64_t, kTallyColumns> tally{};  // finite, zeros, tiny, inf, nan
  std::vector<int64_t> counts;                 // [2, octaves, 2^mantissa_bits]
};

// e with 2^e <= |x| < 2^(e+1), x finite and not zero.
inline int exponent_of(double x) { return std::ilogb(x); }

// Index into the counts of one channel; negative numbers first.
inline int64_t bin_of(float x, HistogramLayout layout) {
  const int octaves = layout.octaves, e = exponent_of(x);
  const int slot = ((e % octaves) + octaves) % octaves;
  const double mantissa = std::ldexp(std::fabs(static_cast<double>(x)), -e);  // [1, 2)
  const auto k = static_cast<int64_t>(std::ldexp(mantissa - 1, layout.mantissa_bits));
  return (((x > 0 ? octaves : 0) + slot) << layout.mantissa_bits) + k;
}

inline State observe(const Values& values, HistogramLayout layout) {
  State s;
  s.counts.assign(layout.size(), 0);
  for (const float x : values) {
    s.tally[std::isnan(x) ? 4 : std::isinf(x) ? 3 : 0] += 1;
    if (!std::isfinite(x)) continue;
    s.tally[1] += x == 0 ? 1 : 0;
    if (x < s.min) s.min = x == 0 ? 0.0f : x;
    if (x > s.max) s.max = x == 0 ? 0.0f : x;
  }
  if (layout.octaves == 0 || s.tally[0] == s.tally[1]) return s;
  const int top = exponent_of(std::fmax(-s.min, s.max));
  for (const float x : values) {
    if (!std::isfinite(x) || x == 0) continue;
    const int e = exponent_of(x);
    if (e >= kLeastExponent && e > top - layout.octaves)
      s.counts[bin_of(x, layout)] += 1;
    else
      s.tally[2] += 1;
  }
  return s;
}

// The memory of a statistic, empty at first.
class Memory {
 public:
  Memory(int64_t channels, HistogramLayout layout)
      : channels_(channels),
        layout_(layout),
        extrema_(2 * channels),
        tally_(kTallyColumns * channels),
        counts_(channels * layout.size()) {
    for (int64_t i = 0; i < 2 * channels; ++i) extrema_[i] = i % 2 == 0 ? kInfinity : -kInfinity;
  }

  torch_ext::core::Statistic raw() {
    return {extrema_.data(), tally_.data(), layout_.octaves == 0 ? nullptr : counts_.data(),
            channels_, layout_};
  }
  ChannelStatistic channel(int64_t c) { return raw().channel(c); }
  const float* extrema(int64_t c) const { return extrema_.data() + 2 * c; }
  const int64_t* tally(int64_t c) const { return tally_.data() + kTallyColumns * c; }
  const int64_t* counts(int64_t c) const { return counts_.data() + c * layout_.size(); }
  int64_t channels() const { return channels_; }
  HistogramLayout layout() const { return layout_; }

  // Bit for bit.
  friend bool operator==(const Memory& a, const Memory& b) {
    return a.extrema_.size() == b.extrema_.size() && a.tally_ == b.tally_ &&
           a.counts_ == b.counts_ &&
           std::memcmp(a.extrema_.data(), b.extrema_.data(), 4 * a.extrema_.size()) == 0;
  }

 private:
  int64_t channels_;
  HistogramLayout layout_;
  std::vector<float> extrema_;
  std::vector<int64_t> tally_, counts_;
};

inline std::string text(const int64_t* row, int64_t n) {
  std::string out;
  for (int64_t i = 0; i < n; ++i) out += (i == 0 ? "" : ", ") + std::to_string(row[i]);
  return out;
}

// Whether channel c is, bit for bit, the statistic of these values.
inline testing::AssertionResult counts_values(const Memory& have, int64_t c, const Values& values) {
  const State want = observe(values, have.layout());
  const float extrema[2] = {want.min, want.max};
  if (std::memcmp(extrema, have.extrema(c), sizeof extrema) != 0)
    return testing::AssertionFailure()
           << "channel " << c << ": extrema " << have.extrema(c)[0] << ", " << have.extrema(c)[1]
           << ", want " << want.min << ", " << want.max;
  if (std::memcmp(want.tally.data(), have.tally(c), sizeof want.tally) != 0)
    return testing::AssertionFailure()
           << "channel " << c << ": tally " << text(have.tally(c), kTallyColumns) << ", want "
           << text(want.tally.data(), kTallyColumns);
  for (int64_t i = 0; i < have.layout().size(); ++i) {
    if (have.counts(c)[i] != want.counts[i])
      return testing::AssertionFailure() << "channel " << c << ": counts[" << i << "] "
                                         << have.counts(c)[i] << ", want " << want.counts[i];
  }
  return testing::AssertionSuccess();
}

// The same of every channel.
inline testing::AssertionResult all_count(const Memory& have, const std::vector<Values>& channels) {
  for (size_t c = 0; c < channels.size(); ++c) {
    const auto result = counts_values(have, static_cast<int64_t>(c), channels[c]);
    if (!result) return result;
  }
  return testing::AssertionSuccess();
}

// Kinds of data.
enum class Kind {
  gauss,
  laplace,
  relu,
  negative,
  lattice,
  outlier,
  two_scales,
  shifted,
  constant,
  zeros,
  subnormal,
  wide,
  any_bits
};
constexpr Kind kKinds[] = {Kind::gauss,    Kind::laplace, Kind::relu,       Kind::negative,
                           Kind::lattice,  Kind::outlier, Kind::two_scales, Kind::shifted,
                           Kind::constant, Kind::zeros,   Kind::subnormal,  Kind::wide,
                           Kind::any_bits};
// Those that a search has something to find in.
constexpr Kind kSearchable[] = {Kind::gauss,      Kind::laplace, Kind::relu,
                                Kind::negative,   Kind::lattice, Kind::outlier,
                                Kind::two_scales, Kind::shifted, Kind::constant};

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float value_of(Kind kind, Random& random, bool first) {
  const double g = std::normal_distribution<double>()(random);
  const bool coin = (random() & 1) != 0;
  switch (kind) {
    case Kind::gauss:
      return static_cast<float>(g);
    case Kind::laplace:
      return static_cast<float>(std::exponential_distribution<double>()(random) * (coin ? 1 : -1));
    case Kind::relu:
      return g > 0 ? static_cast<float>(g) : (coin ? 0.0f : -0.0f);
    case Kind::negative:
      return static_cast<float>(-std::fabs(g) - 0.01);
    case Kind::lattice:
      return static_cast<float>(static_cast<int>(random() % 41) - 20) / 8;
    case Kind::outlier:
      return first ? 1e4f : static_cast<float>(g);
    case Kind::two_scales:
      return static_cast<float>(g * (coin ? 1e-3 : 10));
    case Kind::shifted:
      return static_cast<float>(g + 7);
    case Kind::constant:
      return 1.7f;
    case Kind::zeros:
      return coin ? 0.0f : -0.0f;
    case Kind::subnormal:
      return float_of(static_cast<uint32_t>(random()) & 0x807fffffu);
    case Kind::wide:
      return static_cast<float>(std::ldexp(g, static_cast<int>(random() % 270) - 148));
    case Kind::any_bits:
      return float_of(static_cast<uint32_t>(random()));
  }
  return 0;
}

inline Values sample(Kind kind, int64_t n, Random& random) {
  Values values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = value_of(kind, random, i == 0);
  return values;
}

template <class T, size_t N>
const T& pick(const T (&choices)[N], Random& random) {
  return choices[random() % N];
}

// Between first and last, both included.
inline int64_t between(int64_t first, int64_t last, Random& random) {
  return first + static_cast<int64_t>(random() % static_cast<uint64_t>(last - first + 1));
}

constexpr HistogramLayout kLayouts[] = {{10, 16}, {7, 12}, {5, 4}, {10, 32}, {6, 5}, {8, 7}};

}  // namespace statistic_plain
