#pragma once

#include <cstdint>

#include "core/cumulative.h"
#include "core/grid.h"

// The candidate thresholds of search rules, and the choice of the best.
namespace torch_ext::core {

constexpr int64_t kPerOctave = 128;

// T = 2^e (1 + s/128), s = 1..128, for each octave e of the window: from the first with at least
// half of the non-zero values below it, to the first that reaches max|x|.
struct Lattice {
  int32_t bottom;
  int64_t first;
  int64_t count;
};

TE_HD double lattice_value(int32_t bottom, int64_t j) {
  const double mantissa = static_cast<double>(kPerOctave + j % kPerOctave + 1);
  return mantissa * exp2_of(bottom - kBias - 7 + static_cast<int32_t>(j / kPerOctave));
}

// The least j in [0, size) that fulfils the (monotone) condition, or size.
template <class Condition>
TE_HD int64_t first_where(int64_t size, const Condition& holds) {
  int64_t low = 0, high = size;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (holds(middle))
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

TE_HD Lattice make_lattice(const View& view) {
  const int64_t size = view.top == 0 ? 0 : int64_t{view.top - view.bottom + 1} * kPerOctave;
  const double values = static_cast<double>(nonzero(view));
  const int64_t first = first_where(size, [&](int64_t j) {
    return 2 * view.count_below(lattice_value(view.bottom, j)) >= values;
  });
  const int64_t last =
      first_where(size, [&](int64_t j) { return lattice_value(view.bottom, j) >= view.largest(); });
  return {view.bottom, first, first <= last && last < size ? last - first + 1 : 0};
}

// An upper bound of the number of candidates.
TE_HD int64_t lattice_size(HistogramLayout layout) { return layout.octaves * kPerOctave; }

// Objectives up to this bound count as equal to the least: rounding must not decide.
TE_HD double tie_bound(double least) { return least + 1e-12 * __builtin_fabs(least) + 1e-14; }

// Index of the least objective, or -1 where none is finite. Ties go to the smallest index, or to
// the largest with `last`.
TE_HD int64_t argmin(const double* objective, int64_t count, bool last) {
  double least = __builtin_inf();
  for (int64_t i = 0; i < count; ++i) least = objective[i] < least ? objective[i] : least;
  if (!(least < __builtin_inf())) return -1;
  const double bound = tie_bound(least);
  int64_t winner = -1;
  for (int64_t i = 0; i < count; ++i)
    if (objective[i] <= bound && (last || winner < 0)) winner = i;
  return winner;
}

TE_HD double clamp(double x, double lo, double hi) { return x < lo ? lo : (x > hi ? hi : x); }

// The range [-t, t], cut to the range of the data.
TE_HD Range range_of_threshold(const View& view, double t) {
  return {clamp(view.min, -t, t), clamp(view.max, -t, t)};
}

}  // namespace torch_ext::core
