#pragma once

#include <cstdint>

#include "core/histogram.h"
#include "core/option.h"

// The view of one channel's statistic that every rule is solved from: prefix sums over the window's
// bins, ascending in |x|, one row per sign. The sums within an octave are integers, so they are
// exact in any order; octaves are combined in ascending order in float64. So every device computes
// the same bits.
namespace torch_ext::core {

enum Sign { kNegative = 0, kPositive = 1 };

// The most values of a channel for which sums of squares about any level fit 64 bits.
constexpr int64_t kNarrow = int64_t{1} << 39;

struct View {
  HistogramLayout layout;
  int32_t bottom, top;  // octaves of the window (biased exponents); top 0: no window
  double min, max;      // 0, 0 where nothing was observed
  int64_t finite, zeros, tiny;
  int64_t bins;             // bins of one sign in the window, bottom to top
  const int64_t* below[2];  // [bins + 1] values of a sign in the first i bins
  const double* magnitude;  // [bins + 1] values of both signs, and tiny, below bin i
  const int64_t*
      first[2];  // [octaves, 2^m + 1] within an octave: sums of count * k over the first k
  const int64_t* second[2];  // the same of count * k^2
  const int64_t* counts;     // the bins themselves, in their slots (core/histogram.h)
  double sum, squares;       // of x and of x^2; for Needs::moments only

  // Whether `first` and `second` might not fit 64 bits: they are not filled, and are summed from
  // `counts` where they are read.
  TE_HD bool is_wide() const { return finite > kNarrow; }

  TE_HD double largest() const { return -min > max ? -min : max; }
  TE_HD bool one_sided() const { return min >= 0 || max <= 0; }
  // Lower edge of the window, at least 2^-126. Smaller magnitudes are counted as tiny.
  TE_HD double floor() const { return exp2_of(bottom - kBias); }
  // The value that stands for window bin i: its edge of least magnitude.
  TE_HD double value(int64_t i) const {
    const int32_t m = layout.mantissa_bits;
    const int64_t width = int64_t{1} << m;
    const double mantissa = static_cast<double>(width + (i & (width - 1)));
    return mantissa * exp2_of(bottom - kBias - m + static_cast<int32_t>(i >> m));
  }
  // Number of window bins whose value() is less than t.
  TE_HD int64_t position(double t) const {
    const uint64_t bits = __builtin_bit_cast(uint64_t, t);
    const int32_t drop = 52 - layout.mantissa_bits;
    const int64_t base = int64_t{bottom - kBias + 1023} << layout.mantissa_bits;
    const int64_t bin = static_cast<int64_t>(bits >> drop) - base;
    const int64_t above = (bits & ((uint64_t{1} << drop) - 1)) != 0 ? bin + 1 : bin;
    // Selected from what is always computed, so that a loop over t vectorises.
    const int64_t inside = above < bins ? above : bins;
    return t > floor() ? inside : 0;
  }
  // Number of non-zero values with |x| < t, interpolated linearly inside the bin that t falls into;
  // the tiny values count as one bin [0, floor).
  TE_HD double count_below(double t) const {
    const uint64_t bits = __builtin_bit_cast(uint64_t, t);
    const int32_t drop = 52 - layout.mantissa_bits;
    const int64_t base = int64_t{bottom - kBias + 1023} << layout.mantissa_bits;
    const int64_t bin = static_cast<int64_t>(bits >> drop) - base;
    const int64_t least = bin < 0 ? 0 : bin;
    const int64_t inside = least < bins ? least : bins - 1;
    const uint64_t low_bits = bits & ((uint64_t{1} << drop) - 1);
    // low_bits < 2^52 becomes a double through the mantissa of 2^52.
    const double fraction =
        (__builtin_bit_cast(double, low_bits | 0x4330000000000000u) - 0x1p52) * exp2_of(-drop);
    // All cases are computed and one is selected, so that a loop over t vectorises.
    const double all = magnitude[bins], begin = magnitude[inside], end = magnitude[inside + 1];
    const double in_tiny = static_cast<double>(tiny) * (t * exp2_of(kBias - bottom));
    const double in_bin = begin + (end - begin) * fraction;
    const double in_window = least < bins ? in_bin : all;
    return bin < 0 ? in_tiny : in_window;
  }
};

TE_HD int64_t nonzero(const View& view) { return view.finite - view.zeros; }

// 64-bit words of memory a view needs.
TE_HD int64_t view_words(HistogramLayout layout, Needs needs) {
  if (needs < Needs::counts) return 0;
  const int64_t prefixes = 3 * (layout.bins() + 1);
  const int64_t moments = 4 * (layout.bins() + layout.octaves);
  return needs == Needs::moments ? prefixes + moments : prefixes;
}

// Sums over bins: of the count, since the bottom of the window, and of count * k and count * k^2,
// since the bottom of the octave.
struct Prefix {
  int64_t count, first, second;
};

TE_HD Prefix prefix_of(const int64_t* bins, int64_t begin, int64_t end, bool moments) {
  Prefix sum{0, 0, 0};
  for (int64_t k = begin; k < end; ++k) {
    sum.count += bins[k];
    if (!moments) continue;
    sum.first += bins[k] * k;
    sum.second += bins[k] * k * k;
  }
  return sum;
}

// Sum of (x - v)^2 over the values x = 2^m + k of one octave, given their sums, 0 <= v <= 4 * 2^m.
// The sum is taken about the integer nearest to v in integers, so no large float terms cancel.
TE_HD double near_octave_error(const Prefix& sums, double v, int32_t m) {
  const int64_t near = static_cast<int64_t>(v + 0.5);
  const double offset = v - static_cast<double>(near);
  // Unsigned, modulo 2^64: intermediate terms may overflow, the sum itself fits.
  const uint64_t shift = static_cast<uint64_t>(near - (int64_t{1} << m));
  const uint64_t n = static_cast<uint64_t>(sums.count), s1 = static_cast<uint64_t>(sums.first);
  const int64_t about1 = static_cast<int64_t>(s1 - shift * n);
  const int64_t about2 =
      static_cast<int64_t>(static_cast<uint64_t>(sums.second) - 2 * shift * s1 + shift * shift * n);
  return static_cast<double>(about2) - 2 * offset * static_cast<double>(about1) +
         offset * offset * static_cast<double>(sums.count);
}

// The same for any v >= 0.
TE_HD double octave_error(const Prefix& sums, double v, int32_t m) {
  const int64_t width = int64_t{1} << m;
  if (!(v > static_cast<double>(4 * width))) return near_octave_error(sums, v, m);
  const double x1 = static_cast<double>(sums.first + width * sums.count);
  const double x2 =
      static_cast<double>(sums.second + 2 * width * sums.first + width * width * sums.count);
  return x2 - 2 * v * x1 + v * v * static_cast<double>(sums.count);
}

// The sums over window bins [begin, end) of one octave of a view that is not wide, `count` of them.
TE_HD Prefix sums_between(const View& view, Sign sign, int64_t begin, int64_t end, int64_t count) {
  const int64_t row = begin >> view.layout.mantissa_bits;  // a row has one element more
  return {count, view.first[sign][row + end] - view.first[sign][row + begin],
          view.second[sign][row + end] - view.second[sign][row + begin]};
}

// Of a wide view, the sums of the low kLowBits bits of each count, or of the rest.
constexpr int kLowBits = 27;
TE_HD Prefix wide_sums_between(const View& view, Sign sign, int64_t begin, int64_t end, bool low) {
  const int32_t m = view.layout.mantissa_bits;
  const int64_t octave = begin >> m, octave_begin = octave << m;
  const int64_t* const bins = view.counts + sign * view.layout.bins() +
                              view.layout.octave_begin(view.bottom + static_cast<int32_t>(octave));
  Prefix sum{0, 0, 0};
  for (int64_t k = begin - octave_begin; k < end - octave_begin; ++k) {
    const int64_t n = low ? bins[k] & ((int64_t{1} << kLowBits) - 1) : bins[k] >> kLowBits;
    sum.count += n;
    sum.first += n * k;
    sum.second += n * k * k;
  }
  return sum;
}

// A quantity that is linear in the counts, of the values in window bins [begin, end) of one octave,
// of which there are `count`: computed from their sums, in two parts where the view is wide.
template <class Of>
TE_HD double of_sums(const View& view, Sign sign, int64_t begin, int64_t end, int64_t count,
                     const Of& of) {
  if (!view.is_wide()) return of(sums_between(view, sign, begin, end, count));
  return of(wide_sums_between(view, sign, begin, end, true)) +
         exp2_of(kLowBits) * of(wide_sums_between(view, sign, begin, end, false));
}

// Sum of (|x| - v)^2 over the values of a sign in window bins [begin, end), v >= 0.
TE_HD double squared_error(const View& view, Sign sign, int64_t begin, int64_t end, double v) {
  const int32_t m = view.layout.mantissa_bits;
  const int64_t width = int64_t{1} << m;
  double total = 0;
  while (begin < end) {
    const int64_t octave = begin >> m, octave_begin = octave << m;
    const int64_t stop = end < octave_begin + width ? end : octave_begin + width;
    const int64_t count = view.below[sign][stop] - view.below[sign][begin];
    if (count != 0) {
      const double unit = exp2_of(view.bottom - kBias - m + static_cast<int32_t>(octave));
      const double error = of_sums(view, sign, begin, stop, count,
                                   [&](const Prefix& sums) __attribute__((always_inline)) {
                                     return octave_error(sums, v / unit, m);
                                   });
      total += error * (unit * unit);
    }
    begin = stop;
  }
  return total;
}

// Sum of |x| over the values of a sign in window bins [begin, end).
TE_HD double magnitude_sum(const View& view, Sign sign, int64_t begin, int64_t end) {
  const int32_t m = view.layout.mantissa_bits;
  const int64_t width = int64_t{1} << m;
  double total = 0;
  while (begin < end) {
    const int64_t octave = begin >> m, octave_begin = octave << m;
    const int64_t stop = end < octave_begin + width ? end : octave_begin + width;
    const int64_t count = view.below[sign][stop] - view.below[sign][begin];
    const double unit = exp2_of(view.bottom - kBias - m + static_cast<int32_t>(octave));
    total += unit * of_sums(view, sign, begin, stop, count,
                            [&](const Prefix& sums) __attribute__((always_inline)) {
                              return static_cast<double>(sums.first + width * sums.count);
                            });
    begin = stop;
  }
  return total;
}

// Sum over all values of (x - mean)^2; zeros and tiny are at 0.
TE_HD double squared_deviation(const View& view, double mean) {
  const double toward = mean < 0 ? -mean : mean;
  const Sign same = mean < 0 ? kNegative : kPositive, other = mean < 0 ? kPositive : kNegative;
  const int64_t at_zero = view.zeros + view.tiny;
  // On the far side (|x| + |mean|)^2 = x^2 + 2 |x| |mean| + mean^2: no cancellation.
  const int64_t far = view.below[other][view.bins];
  return squared_error(view, same, 0, view.bins, toward) +
         squared_error(view, other, 0, view.bins, 0) +
         2 * toward * magnitude_sum(view, other, 0, view.bins) +
         toward * toward * static_cast<double>(at_zero + far);
}

// Where the arrays of a view are in its memory.
struct ViewArrays {
  int64_t* below[2];
  double* magnitude;
  int64_t* first[2];
  int64_t* second[2];
};

TE_HD ViewArrays view_arrays(HistogramLayout layout, int64_t* words) {
  const int64_t prefix = layout.bins() + 1, row = layout.bins() + layout.octaves;
  int64_t* const moments = words + 3 * prefix;
  return {{words, words + prefix},
          reinterpret_cast<double*>(words + 2 * prefix),
          {moments, moments + 2 * row},
          {moments + row, moments + 3 * row}};
}

// A view whose arrays are filled elsewhere.
TE_HD View frame_view(HistogramLayout layout, Needs needs, const float* extrema,
                      const int64_t* tally, const int64_t* counts, int64_t* words) {
  View view{};
  view.layout = layout;
  view.counts = counts;
  view.finite = tally[kFinite];
  view.zeros = tally[kZeros];
  view.tiny = tally[kTiny];
  const bool has_values = view.finite > 0;
  view.min = has_values ? static_cast<double>(extrema[0]) : 0.0;
  view.max = has_values ? static_cast<double>(extrema[1]) : 0.0;
  if (needs < Needs::counts) return view;
  view.top = has_values ? top_octave(extrema[0], extrema[1]) : 0;
  view.bottom = layout.bottom(view.top);
  view.bins = view.top == 0 ? 0 : int64_t{view.top - view.bottom + 1} << layout.mantissa_bits;
  const ViewArrays arrays = view_arrays(layout, words);
  view.magnitude = arrays.magnitude;
  for (int sign = 0; sign < 2; ++sign) {
    view.below[sign] = arrays.below[sign];
    view.first[sign] = arrays.first[sign];
    view.second[sign] = arrays.second[sign];
  }
  return view;
}

// Whether `first` and `second` are filled.
TE_HD bool fills_moments(const View& view, Needs needs) {
  return needs == Needs::moments && !view.is_wide();
}

// Writes the prefix sums after each of the bins [begin, end) of one sign's octave; `before` are the
// sums before `begin`.
TE_HD void fill_octave(const ViewArrays& arrays, HistogramLayout layout, bool moments, int sign,
                       int64_t octave, const int64_t* bins, int64_t begin, int64_t end,
                       Prefix before) {
  const int32_t m = layout.mantissa_bits;
  int64_t* const below = arrays.below[sign] + (octave << m) + 1;
  for (int64_t k = begin; k < end; ++k) below[k] = before.count += bins[k];
  if (!moments) return;
  int64_t* const first = arrays.first[sign] + octave * ((int64_t{1} << m) + 1);
  int64_t* const second = arrays.second[sign] + octave * ((int64_t{1} << m) + 1);
  if (begin == 0) first[0] = second[0] = 0;
  for (int64_t k = begin; k < end; ++k) {
    first[k + 1] = before.first += bins[k] * k;
    second[k + 1] = before.second += bins[k] * k * k;
  }
}

TE_HD double magnitude_below(const View& view, const ViewArrays& arrays, int64_t i) {
  return static_cast<double>(view.tiny + arrays.below[kNegative][i] + arrays.below[kPositive][i]);
}

// Computes view.sum and view.squares from the filled arrays.
TE_HD void add_moments(View& view) {
  view.sum =
      magnitude_sum(view, kPositive, 0, view.bins) - magnitude_sum(view, kNegative, 0, view.bins);
  view.squares = squared_error(view, kPositive, 0, view.bins, 0) +
                 squared_error(view, kNegative, 0, view.bins, 0);
}

// One channel's view; `words` holds view_words() words.
TE_HD View build_view(HistogramLayout layout, Needs needs, const float* extrema,
                      const int64_t* tally, const int64_t* counts, int64_t* words) {
  View view = frame_view(layout, needs, extrema, tally, counts, words);
  if (needs < Needs::counts) return view;
  const int32_t m = layout.mantissa_bits;
  const ViewArrays arrays = view_arrays(layout, words);
  for (int sign = 0; sign < 2; ++sign) {
    arrays.below[sign][0] = 0;
    for (int64_t octave = 0; octave < view.bins >> m; ++octave) {
      const int64_t* bins = counts + sign * layout.bins() +
                            layout.octave_begin(view.bottom + static_cast<int32_t>(octave));
      fill_octave(arrays, layout, fills_moments(view, needs), sign, octave, bins, 0,
                  int64_t{1} << m, {arrays.below[sign][octave << m], 0, 0});
    }
  }
  for (int64_t i = 0; i <= view.bins; ++i) arrays.magnitude[i] = magnitude_below(view, arrays, i);
  if (needs == Needs::moments) add_moments(view);
  return view;
}

}  // namespace torch_ext::core
