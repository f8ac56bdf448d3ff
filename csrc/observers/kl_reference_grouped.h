#pragma once

#include "observers/kl_reference_tables.h"

// slides, modelopt, horizon (bins grouped whole) and ncnn (bins split at group borders): candidate
// m keeps the first m bins of a histogram of |x|. `Lanes` consecutive candidates are computed at a
// time, 16 where that vectorises, 1 in a GPU thread. The operations on a candidate and their order
// do not depend on `Lanes`.
namespace torch_ext::observers::kl_reference {

// The group borders g*m/levels of each candidate m, for ascending g, as bin + remainder/levels.
template <int Lanes>
struct Borders {
  int64_t step[Lanes];
  double step_remainder[Lanes];  // m = step * levels + step_remainder
  int64_t bin[Lanes];
  double remainder[Lanes];

  TE_HD void start(int lane, int64_t m, int64_t levels) {
    step[lane] = m / levels;
    step_remainder[lane] = static_cast<double>(m % levels);
    bin[lane] = 0;
    remainder[lane] = 0;
  }
  TE_HD void advance(int lane, double levels) {
    const double next = remainder[lane] + step_remainder[lane];
    const bool carries = next >= levels;
    remainder[lane] = carries ? next - levels : next;
    bin[lane] += step[lane] + (carries ? 1 : 0);
  }
};

// Sums of weight * ln(ratio), with the exponents summed separately.
template <int Lanes>
struct LogSums {
  double exponents[Lanes];
  double mantissas[Lanes];

  TE_HD void start(int lane) { exponents[lane] = mantissas[lane] = 0; }
  TE_HD void add(int lane, double weight, core::SplitLog log) {
    exponents[lane] += weight * log.exponent;
    mantissas[lane] += weight * log.mantissa;
  }
  TE_HD double value(int lane) const { return exponents[lane] * core::kLn2 + mantissas[lane]; }
};

// Whole bins. With C the mass kept, O the mass beyond, N = C + O, S_g and n_g mass and non-empty
// bins of group g, q_g = S_g/n_g + floor:
//   N KL = sum p ln p - sum_g S_g ln q_g - O ln q_last + N ln(C/N)
template <int Lanes>
struct WholeBins {
  Borders<Lanes> border;
  double mass[Lanes], filled[Lanes];  // below the border
  double floor[Lanes];
  double q_exponent[Lanes], q_mantissa[Lanes];  // ln q_g
  LogSums<Lanes> sum;

  TE_HD void start(const Tables& tables, double floor_share, int lane, int64_t m) {
    border.start(lane, m, tables.levels);
    mass[lane] = filled[lane] = q_exponent[lane] = q_mantissa[lane] = 0;
    floor[lane] = floor_share * tables.mass[m];
    sum.start(lane);
  }
  TE_HD void next_group(const Tables& tables) {
    const double levels = static_cast<double>(tables.levels);
    const double* masses = tables.mass;
    const double* fills = tables.filled;
    for (int lane = 0; lane < Lanes; ++lane) {
      border.advance(lane, levels);
      const int64_t end = border.bin[lane] + (border.remainder[lane] > 0 ? 1 : 0);
      const double below = masses[end], filled_below = fills[end];
      const double group_mass = below - mass[lane];
      const double bins = filled_below - filled[lane];
      const core::SplitLog log =
          core::log_ratio(at_least_tiny(group_mass + floor[lane] * bins), at_least_tiny(bins));
      sum.add(lane, group_mass, log);
      q_exponent[lane] = log.exponent;
      q_mantissa[lane] = log.mantissa;
      mass[lane] = below;
      filled[lane] = filled_below;
    }
  }
  TE_HD double divergence(const Tables& tables, int lane, int64_t m) const {
    const double kept = tables.mass[m];
    const double beyond = tables.total - kept;
    const double last = kept - tables.mass[m - 1];
    // In an empty last bin q is 0, or the floor.
    const bool last_is_out = beyond > 0 && !(last > 0);
    if (!(kept > 0) || (last_is_out && !(floor[lane] > 0))) return __builtin_inf();
    const double log_last =
        last_is_out ? core::log(floor[lane]) : q_exponent[lane] * core::kLn2 + q_mantissa[lane];
    const double p_sum = tables.entropy[m - 1] + entropy_of(last + beyond);
    return (p_sum - sum.value(lane) - beyond * log_last) / tables.total +
           core::log_ratio(kept, tables.total).value();
  }
};

// ncnn: bins are split. Every bin has smoothing e = 1e-4 N on top of its count; masses here include
// it. A group of width m/levels has q_g = its mass over its width; the bin at its left border
// belongs to it with share 1-f and to the group before with share f (f = 0: whole). With O the mass
// beyond:
//   N KL = sum p ln p - sum_g (whole_g ln q_g + border_g ln(f q_{g-1} + (1-f) q_g)) - O ln q_last
// Nothing is normalised again.
template <int Lanes>
struct SplitBins {
  Borders<Lanes> border;
  double per_width[Lanes];
  double left_share[Lanes];   // f at the left border of the next group
  double border_mass[Lanes];  // of the bin there
  double after[Lanes];        // mass up to the end of that bin
  double mass[Lanes];         // up to the border itself
  double q[Lanes];
  LogSums<Lanes> sum;

  TE_HD void start(const Tables& tables, double, int lane, int64_t m) {
    border.start(lane, m, tables.levels);
    per_width[lane] = static_cast<double>(tables.levels) / static_cast<double>(m);
    left_share[lane] = mass[lane] = q[lane] = 0;
    border_mass[lane] = after[lane] = tables.mass[1];
    sum.start(lane);
  }
  TE_HD void next_group(const Tables& tables) {
    const double levels = static_cast<double>(tables.levels), per_level = 1.0 / levels;
    const double* masses = tables.mass;
    for (int lane = 0; lane < Lanes; ++lane) {
      border.advance(lane, levels);
      const double below = masses[border.bin[lane]];
      const double next_after = masses[border.bin[lane] + 1];
      const double share = border.remainder[lane] * per_level;
      const double next_border = next_after - below;
      const double next_mass = below + share * next_border;
      const double next_q = (next_mass - mass[lane]) * per_width[lane];
      const double q_border = left_share[lane] * q[lane] + (1.0 - left_share[lane]) * next_q;
      sum.add(lane, below - after[lane], core::log_ratio(next_q, 1.0));
      sum.add(lane, border_mass[lane], core::log_ratio(q_border, 1.0));
      left_share[lane] = share;
      border_mass[lane] = next_border;
      after[lane] = next_after;
      mass[lane] = next_mass;
      q[lane] = next_q;
    }
  }
  TE_HD double divergence(const Tables& tables, int lane, int64_t m) const {
    if (!(tables.total > 0)) return __builtin_inf();
    // q_last is computed again without the rounding errors of the sums of smoothed masses, because
    // its weight can be as large as N.
    const double* counts = tables.counted;
    const int64_t bin = (tables.levels - 1) * m / tables.levels;
    const double share = static_cast<double>((tables.levels - 1) * m % tables.levels) /
                         static_cast<double>(tables.levels);
    const double before = counts[bin] + share * (counts[bin + 1] - counts[bin]);
    const double q_last = tables.smoothing + (counts[m] - before) * per_width[lane];
    const double beyond = tables.total - counts[m];
    const double last = tables.smoothing + (counts[m] - counts[m - 1]);
    const double p_sum = tables.entropy[m - 1] + entropy_of(last + beyond);
    return (p_sum - sum.value(lane) - beyond * core::log(q_last)) / tables.total;
  }
};

// Divergences of the candidates first .. first+Lanes-1, those past `last` repeating `last`.
template <class Candidates, int Lanes>
TE_HD void divergences(const Tables& tables, double floor_share, int64_t first, int64_t last,
                       double* out) {
  Candidates candidates;
  for (int lane = 0; lane < Lanes; ++lane)
    candidates.start(tables, floor_share, lane, first + lane < last ? first + lane : last);
  for (int64_t g = 0; g < tables.levels; ++g) candidates.next_group(tables);
  for (int lane = 0; lane < Lanes; ++lane)
    out[lane] = candidates.divergence(tables, lane, first + lane < last ? first + lane : last);
}

}  // namespace torch_ext::observers::kl_reference
