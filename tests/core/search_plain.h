#pragma once

#include <limits>
#include <vector>

#include "core/grid.h"
#include "core/qparams.h"
#include "float_format_plain.h"
#include "view_plain.h"

// The searches by their definitions, in long double over atoms: every candidate, every value.
namespace search_plain {

using torch_ext::core::Grid;
using view_plain::Atoms;
using view_plain::Real;

constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

// T = 2^e (1 + s/128), s = 1..128, in ascending order: from the first with at least half of the
// non-zero values below it, to the first that reaches max|x|.
inline std::vector<Real> candidates(const Atoms& atoms, int octaves) {
  std::vector<Real> kept;
  const Real largest = atoms.largest();
  if (largest < 0x1p-126L) return kept;
  const int top = std::ilogb(largest);
  for (int e = std::max(-126, top - octaves + 1); e <= top; ++e) {
    for (int s = 1; s <= 128; ++s) {
      const Real t = std::ldexp(1 + s / 128.0L, e);
      if (2 * atoms.count_below(t) >= atoms.nonzero) kept.push_back(t);
      if (t >= largest) return kept;
    }
  }
  return kept;
}

inline Real clamp(Real x, Real lo, Real hi) { return x < lo ? lo : x > hi ? hi : x; }

inline const float_plain::Format& format_of(const Grid& grid) {
  int i = 0;
  while (!(torch_ext::core::kFloatFormats[i].format == grid.format)) ++i;
  return float_plain::kFormats[i];
}

// Squared error of quantizing the atoms with the qparams of a range, over the sum of squares.
inline Real squared_error(const Atoms& atoms, const Grid& grid, Real lo, Real hi) {
  const auto q = torch_ext::core::qparams({static_cast<double>(lo), static_cast<double>(hi)}, grid);
  const Real energy = atoms.sum([](Real x) { return x * x; });
  if (energy == 0) return 0;
  const Real error = atoms.sum([&](Real x) {
    if (grid.is_float()) {
      const Real off = x - float_plain::nearest(format_of(grid), x / q.scale) * q.scale;
      return off * off;
    }
    const Real level = clamp(std::rint(x / q.scale) + q.zero_point, grid.quant_min, grid.quant_max);
    const Real off = x - (level - q.zero_point) * q.scale;
    return off * off;
  });
  return error / energy;
}

inline Real mse(const Atoms& atoms, const Grid& grid, Real t) {
  return squared_error(atoms, grid, clamp(atoms.min, -t, t), clamp(atoms.max, -t, t));
}

inline int kl_levels(const Atoms& atoms, const Grid& grid) {
  const bool one_sided = atoms.min >= 0 || atoms.max <= 0;
  const bool follows = grid.quant_min == 0 || !grid.symmetric;
  return 1 << (one_sided && follows ? grid.bits() : grid.bits() - 1);
}

// Divergence of the bins from their level means, less the bias of sampling noise.
inline Real kl(const Atoms& atoms, const Grid& grid, Real t) {
  constexpr int kBins = 8;  // per level
  const int levels = kl_levels(atoms, grid), n = kBins * levels;
  const Real values = atoms.nonzero, kept = atoms.count_below(t), outliers = values - kept;
  std::vector<Real> below(n + 1);
  for (int i = 0; i <= n; ++i) below[i] = atoms.count_below(i * t / n);
  Real divergence = 0;
  int bins_in_use = 0, levels_in_use = 0;
  for (int level = 0; level < levels; ++level) {
    Real sum = 0;
    int in_use = 0;
    for (int i = level * kBins; i < (level + 1) * kBins; ++i) {
      sum += below[i + 1] - below[i];
      in_use += below[i + 1] > below[i] ? 1 : 0;
    }
    const bool last = level == levels - 1;
    if (last && in_use == 0 && outliers > 0) return kInfinity;
    bins_in_use += in_use;
    levels_in_use += in_use > 0 ? 1 : 0;
    for (int i = level * kBins; i < (level + 1) * kBins; ++i) {
      const Real count = below[i + 1] - below[i];
      if (!(count > 0)) continue;
      const Real p = (count + (last ? outliers / in_use : 0)) / values;
      divergence += p * std::log(p / (sum / in_use / kept));
    }
  }
  return divergence - (bins_in_use - levels_in_use) / (2 * values);
}

}  // namespace search_plain
