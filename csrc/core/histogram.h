#pragma once

#include <cstdint>

#include "core/host_device.h"

// The log-linear histogram (as HdrHistogram's, on the bits of a float32): a finite normal value
// falls into octave e, its biased exponent, and sub-bin k, its top `mantissa_bits` mantissa bits.
// Only a window is kept: the `octaves` octaves up to that of the largest |x|. Smaller non-zero
// values are counted as tiny.
namespace torch_ext::core {

constexpr uint32_t kAbsBits = 0x7fffffffu;
constexpr uint32_t kInfBits = 0x7f800000u;
constexpr int kMantissa = 23;  // explicit mantissa bits of float32
constexpr int kBias = 127;     // exponent bias of float32

TE_HD uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
TE_HD float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// 2^exponent as a double, for -1022 <= exponent <= 1023.
TE_HD double exp2_of(int exponent) {
  return __builtin_bit_cast(double, static_cast<uint64_t>(exponent + 1023) << 52);
}

// Integer keys in the order of the floats. Comparing them is exact for subnormals whatever
// the processor's denormal mode, and NaN and infinity lie outside [kMinFiniteKey, kMaxFiniteKey].
constexpr int32_t kMaxFiniteKey = 0x7f7fffff;
constexpr int32_t kMinFiniteKey = -0x7f7fffff - 1;
TE_HD int32_t key_of(float x) {
  const int32_t bits = __builtin_bit_cast(int32_t, x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
TE_HD float float_of_key(int32_t key) {
  return __builtin_bit_cast(float, key ^ ((key >> 31) & 0x7fffffff));
}

// -0 becomes +0, everything else stays.
TE_HD float positive_zero(float x) { return (bits_of(x) & kAbsBits) == 0 ? 0.0f : x; }

// Columns of `tally`.
enum TallyColumn { kFinite = 0, kZeros = 1, kTiny = 2, kInf = 3, kNan = 4, kTallyColumns = 5 };

struct HistogramLayout {
  int32_t mantissa_bits;
  int32_t octaves;  // 0: no histogram is kept

  // Bins of one sign.
  TE_HD int64_t bins() const { return int64_t{octaves} << mantissa_bits; }
  TE_HD int64_t size() const { return 2 * bins(); }
  // Lowest octave (biased exponent) of the window that ends at octave `top`. At least 1: subnormals
  // belong to no octave.
  TE_HD int32_t bottom(int32_t top) const {
    const int32_t lowest = top - octaves + 1;
    return lowest < 1 ? 1 : lowest;
  }
  // The slot that stores octave `biased`: its unbiased exponent mod octaves. When the window rises,
  // new octaves take the slots of those that leave it, so no counts are moved.
  TE_HD int32_t slot(int32_t biased) const {
    const int32_t residue = (biased - kBias) % octaves;
    return residue < 0 ? residue + octaves : residue;
  }
  // First bin of octave `biased` in the counts of one sign.
  TE_HD int64_t octave_begin(int32_t biased) const {
    return int64_t{slot(biased)} << mantissa_bits;
  }
};

// The window in the form that the computation of bin indices needs.
struct Window {
  uint32_t first;   // bits >> shift of the window's lower edge: bottom << mantissa_bits
  uint32_t width;   // bins of one sign that the window spans
  uint32_t rotate;  // index of the first bin in the table: its octave's slot << mantissa_bits
  uint32_t bins;    // bins of one sign in the table
  int32_t shift;    // 23 - mantissa_bits

  // Distance in bins from the window's first bin. At least `width`, modulo 2^32, for values
  // outside.
  TE_HD uint32_t relative(uint32_t bits) const { return ((bits & kAbsBits) >> shift) - first; }
  // Index in the counts of a value inside the window.
  TE_HD uint32_t index(uint32_t bits) const {
    const uint32_t positive = ~static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
    const uint32_t slot = relative(bits) + rotate;
    return (slot < bins ? slot : slot - bins) + (positive & bins);
  }
};

// The window that ends at octave `top`; empty for top 0.
TE_HD Window window_of(HistogramLayout layout, int32_t top) {
  const int32_t bottom = layout.bottom(top);
  const uint32_t octaves = top == 0 ? 0 : static_cast<uint32_t>(top - bottom + 1);
  const int32_t m = layout.mantissa_bits;
  return {static_cast<uint32_t>(bottom) << m, octaves << m,
          static_cast<uint32_t>(layout.octave_begin(bottom)), static_cast<uint32_t>(layout.bins()),
          kMantissa - m};
}

// The default layouts: 256 KiB for a tensor, 24 KiB for each channel.
constexpr HistogramLayout kPerTensor = {10, 16};
constexpr HistogramLayout kPerChannel = {7, 12};

// Octave (biased exponent) of the largest |x|; 0 where there is none or it is zero or subnormal.
TE_HD int32_t top_octave(float min, float max) {
  if (!(min <= max)) return 0;  // the empty state (+inf, -inf)
  const uint32_t lo = bits_of(min) & kAbsBits, hi = bits_of(max) & kAbsBits;
  return static_cast<int32_t>((lo > hi ? lo : hi) >> kMantissa);
}

// Adds modulo 2^64: counts from elsewhere may be anything. solve() refuses what has wrapped.
TE_HD void add_count(int64_t& to, int64_t count) {
  to = static_cast<int64_t>(static_cast<uint64_t>(to) + static_cast<uint64_t>(count));
}

// Raises the window of one channel's counts from octave `top` to `new_top`: clears the octaves that
// leave it and returns how many values they held. The caller adds these to tiny.
TE_HD int64_t raise_window(int64_t* counts, HistogramLayout layout, int32_t top, int32_t new_top) {
  if (top == 0 || new_top <= top) return 0;
  const int32_t end = layout.bottom(new_top) <= top ? layout.bottom(new_top) : top + 1;
  const int64_t width = int64_t{1} << layout.mantissa_bits;
  int64_t tiny = 0;
  for (int32_t octave = layout.bottom(top); octave < end; ++octave) {
    for (int sign = 0; sign < 2; ++sign) {
      int64_t* bins = counts + sign * layout.bins() + layout.octave_begin(octave);
      for (int64_t k = 0; k < width; ++k) {
        add_count(tiny, bins[k]);
        bins[k] = 0;
      }
    }
  }
  return tiny;
}

// One channel of a statistic in memory; `counts` may be null.
struct ChannelStatistic {
  float* extrema;   // [2] min, max
  int64_t* tally;   // [5]
  int64_t* counts;  // [2, octaves, 2^mantissa_bits]
};

// Widens the extrema to include [min, max] (finite, or +inf and -inf for no values), and raises the
// window accordingly.
TE_HD void extend(ChannelStatistic into, HistogramLayout layout, float min, float max) {
  const int32_t old_top = layout.octaves == 0 ? 0 : top_octave(into.extrema[0], into.extrema[1]);
  if (key_of(min) < key_of(into.extrema[0])) into.extrema[0] = positive_zero(min);
  if (key_of(max) > key_of(into.extrema[1])) into.extrema[1] = positive_zero(max);
  if (layout.octaves == 0) return;
  const int32_t new_top = top_octave(into.extrema[0], into.extrema[1]);
  add_count(into.tally[kTiny], raise_window(into.counts, layout, old_top, new_top));
}

// Makes `into` the statistic of the values of both. All sums are integers, so the result is exact
// and does not depend on the order of merges.
TE_HD void merge_channel(ChannelStatistic into, HistogramLayout layout, const float* extrema,
                         const int64_t* tally, const int64_t* counts) {
  extend(into, layout, extrema[0], extrema[1]);
  for (int column = 0; column < kTallyColumns; ++column)
    add_count(into.tally[column], tally[column]);
  const int32_t other_top = top_octave(extrema[0], extrema[1]);
  if (layout.octaves == 0 || other_top == 0) return;
  const int32_t bottom = layout.bottom(top_octave(into.extrema[0], into.extrema[1]));
  const int64_t width = int64_t{1} << layout.mantissa_bits;
  for (int32_t octave = layout.bottom(other_top); octave <= other_top; ++octave) {
    for (int sign = 0; sign < 2; ++sign) {
      const int64_t begin = sign * layout.bins() + layout.octave_begin(octave);
      for (int64_t k = begin; k < begin + width; ++k) {
        add_count(octave < bottom ? into.tally[kTiny] : into.counts[k], counts[k]);
      }
    }
  }
}

}  // namespace torch_ext::core
