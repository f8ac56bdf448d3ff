#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "core/cumulative.h"
#include "statistic_plain.h"

// What a view represents, computed from the values themselves in long double.
namespace view_plain {

using statistic_plain::Values;
using torch_ext::core::HistogramLayout;
using Real = long double;

// Values of the window, each rounded towards zero to the edge of its bin; the rest at 0.
struct Atoms {
  // Per sign, ascending in magnitude: edge and number of values.
  std::map<Real, int64_t> side[2];
  int64_t finite = 0, zeros = 0, tiny = 0, nonzero = 0;
  Real min = 0, max = 0;
  Real floor = 0x1p-126L;  // lower end of the window
  // Of both signs: edges, widths, and values before each edge (tiny included).
  std::vector<Real> edge, width, before;

  Real largest() const { return std::max(-min, max); }

  // Non-zero values with |x| < t, linear inside bins and below the window.
  Real count_below(Real t) const {
    if (t <= floor) return tiny * (t / floor);
    const size_t i = std::upper_bound(edge.begin(), edge.end(), t) - edge.begin();
    if (i == 0) return tiny;
    const Real inside = std::min<Real>(1, (t - edge[i - 1]) / width[i - 1]);
    return before[i - 1] + (before[i] - before[i - 1]) * inside;
  }

  // fn(x, count) for every atom, 0 included, ascending.
  template <class Fn>
  void for_each(const Fn& fn) const {
    for (auto it = side[0].rbegin(); it != side[0].rend(); ++it) fn(-it->first, it->second);
    if (zeros + tiny > 0) fn(Real{0}, zeros + tiny);
    for (const auto& [x, count] : side[1]) fn(x, count);
  }
  template <class Fn>
  Real sum(const Fn& fn) const {
    Real total = 0;
    for_each([&](Real x, int64_t count) { total += count * fn(x); });
    return total;
  }
};

// Each value is there `copies` times.
inline Atoms atoms_of(const Values& values, HistogramLayout layout, int64_t copies = 1) {
  Atoms a;
  for (const float x : values) {
    if (!std::isfinite(x)) continue;
    a.min = a.finite == 0 ? x : std::min<Real>(a.min, x);
    a.max = a.finite == 0 ? x : std::max<Real>(a.max, x);
    a.finite += copies;
    a.zeros += x == 0 ? copies : 0;
  }
  a.nonzero = a.finite - a.zeros;
  const int top = a.nonzero == 0 ? -127 : std::ilogb(a.largest());
  a.floor = std::ldexp(Real{1}, std::max(-126, top - layout.octaves + 1));
  std::map<Real, int64_t> both;
  for (const float x : values) {
    if (!std::isfinite(x) || x == 0) continue;
    const Real magnitude = std::fabs(x);
    if (magnitude < a.floor) {
      a.tiny += copies;
      continue;
    }
    const int last_bit = std::ilogb(magnitude) - layout.mantissa_bits;
    const Real edge = std::ldexp(std::floor(std::ldexp(magnitude, -last_bit)), last_bit);
    a.side[x > 0 ? 1 : 0][edge] += copies;
    both[edge] += copies;
  }
  a.before.push_back(a.tiny);
  for (const auto& [edge, count] : both) {
    a.edge.push_back(edge);
    a.width.push_back(std::ldexp(Real{1}, std::ilogb(edge) - layout.mantissa_bits));
    a.before.push_back(a.before.back() + count);
  }
  return a;
}

// A view of these values, and the atoms it stands for.
struct Built {
  Built(const Values& values, HistogramLayout layout, torch_ext::core::Needs needs,
        int64_t copies = 1)
      : atoms(atoms_of(values, layout, copies)),
        state(statistic_plain::observe(values, layout)),
        words(torch_ext::core::view_words(layout, needs)) {
    for (int64_t& count : state.counts) count *= copies;
    for (int64_t& count : state.tally) count *= copies;
    const float extrema[2] = {state.min, state.max};
    view = torch_ext::core::build_view(layout, needs, extrema, state.tally.data(),
                                       state.counts.data(), words.data());
  }
  Built(const Built&) = delete;
  Built& operator=(const Built&) = delete;

  const Atoms atoms;
  statistic_plain::State state;
  std::vector<int64_t> words;
  torch_ext::core::View view;
};

}  // namespace view_plain
