#pragma once

#include "observers/kl_reference_grouped.h"

// tvm and onnxruntime: a signed histogram whose bin bins/2 is at 0; candidate i keeps the bins
// [bins/2 - i, bins/2 + i]. P is the window with all mass beyond it in its two edge bins; `levels`
// groups of equally many bins, the last one with the remainder. P and Q are smoothed: every empty
// bin gets 1e-4 of a count, every other bin gives an equal part of that up.
namespace torch_ext::observers::kl_reference {

// What smoothing takes from each of the `filled` non-empty bins of `bins` bins; negative if there
// is none, or if that is a whole count or more.
TE_HD double deduction(const Tables& tables, double bins, double filled) {
  if (!(filled > 0)) return -1.0;
  const double share = (bins - filled) / filled;
  return kSmoothing * share < 1.0 ? tables.smoothing * share : -1.0;
}

// Sum of (x-e) ln(x-e) over the non-empty bins of [begin, end). Small e: from prefix sums by the
// series
//   f(x-e) = x ln x - e (ln x + 1) + e^2/(2x) + e^3/(6x^2) + e^4/(12x^3) + e^5/(20x^4) + ...
// whose next term is below 6e-16 of a count. Where e is large only few bins are non-empty, and the
// sum visits each.
TE_HD double smoothed_entropy(const Tables& tables, int64_t begin, int64_t end, double e) {
  constexpr double kSeriesLimit = 0.005;  // of a count
  if (e < kSeriesLimit * tables.unit) {
    double power[kInverses];
    for (int k = 0; k < kInverses; ++k)
      power[k] = tables.inverse[k][end] - tables.inverse[k][begin];
    const double series =
        power[0] / 2 + e * (power[1] / 6 + e * (power[2] / 12 + e * power[3] / 20));
    const double logs = tables.logs[end] - tables.logs[begin];
    const double filled = tables.filled[end] - tables.filled[begin];
    return (tables.entropy[end] - tables.entropy[begin]) - e * (logs + filled) + e * e * series;
  }
  double total = 0;
  const auto from = static_cast<int64_t>(tables.filled[begin]);
  const auto to = static_cast<int64_t>(tables.filled[end]);
  for (int64_t k = from; k < to; ++k) total += entropy_of(tables.present[k] - e);
  return total;
}

// A candidate's window and P in it.
struct Window {
  int64_t begin, end;
  int64_t merged;   // bins of a group
  double first;     // P of the first bin
  double last_own;  // mass of the last bin,
  double beyond;    // and what P adds to it
  double filled;    // non-empty bins of P
  double deducted;  // from each of them; negative: not a candidate

  TE_HD double bins() const { return static_cast<double>(end - begin); }
  // 1 if the last bin is empty in the histogram and only the mass beyond fills it in P.
  TE_HD double only_beyond() const { return beyond > 0 && !(last_own > 0) ? 1.0 : 0.0; }
};

TE_HD Window make_window(const Tables& tables, int64_t i) {
  const int64_t center = tables.bins / 2;
  Window window;
  window.begin = center - i;
  window.end = center + i + 1 < tables.bins ? center + i + 1 : tables.bins;
  window.merged = (window.end - window.begin) / tables.levels;
  window.first = tables.mass[window.begin + 1];
  window.last_own = tables.mass[window.end] - tables.mass[window.end - 1];
  window.beyond = tables.total - tables.mass[window.end];
  window.filled = tables.filled[window.end - 1] - tables.filled[window.begin + 1] +
                  (window.first > 0 ? 1.0 : 0.0) +
                  (window.last_own + window.beyond > 0 ? 1.0 : 0.0);
  window.deducted = window.merged > 0 ? deduction(tables, window.bins(), window.filled) : -1.0;
  return window;
}

// Sum of p ln p over the non-empty bins of P.
TE_HD double window_entropy(const Tables& tables, const Window& window) {
  const double e = window.deducted;
  const double last = window.last_own + window.beyond;
  return smoothed_entropy(tables, window.begin + 1, window.end - 1, e) +
         (window.first > 0 ? entropy_of(window.first - e) : 0.0) +
         (last > 0 ? entropy_of(last - e) : 0.0);
}

// N KL = sum p ln p - sum p ln q + N ln(total of q / N), p and q smoothed.
TE_HD double divergence_of(const Tables& tables, double p_sum, double cross, double q_total) {
  return (p_sum - cross) / tables.total + core::log_ratio(q_total, tables.total).value();
}

// Divergences of the candidates first .. first+Lanes-1, those past `last` repeating `last`.
template <class Candidates, int Lanes>
TE_HD void signed_divergences(const Tables& tables, int64_t first, int64_t last, double* out) {
  Candidates candidates;
  for (int lane = 0; lane < Lanes; ++lane)
    candidates.start(tables, lane, first + lane < last ? first + lane : last);
  candidates.sum_groups(tables);
  for (int lane = 0; lane < Lanes; ++lane) out[lane] = candidates.divergence(tables, lane);
}

// Iterates over the groups of each candidate between its first and its last one: mass and non-empty
// bins.
template <int Lanes>
struct InnerGroups {
  int64_t merged[Lanes], begin[Lanes], at[Lanes];
  double below[Lanes], filled_below[Lanes];
  double mass[Lanes], bins[Lanes];

  TE_HD void start(int lane, const Window& window) {
    merged[lane] = window.merged;
    begin[lane] = window.begin + window.merged;
  }
  TE_HD void rewind(const Tables& tables) {
    for (int lane = 0; lane < Lanes; ++lane) {
      at[lane] = begin[lane];
      below[lane] = tables.mass[at[lane]];
      filled_below[lane] = tables.filled[at[lane]];
    }
  }
  TE_HD void next(const double* masses, const double* fills, int lane) {
    at[lane] += merged[lane];
    const double next_below = masses[at[lane]], next_filled = fills[at[lane]];
    mass[lane] = next_below - below[lane];
    bins[lane] = next_filled - filled_below[lane];
    below[lane] = next_below;
    filled_below[lane] = next_filled;
  }
};

struct Group {
  double mass, bins;  // and its non-empty bins
};
TE_HD Group group_between(const Tables& tables, int64_t begin, int64_t end) {
  return {tables.mass[end] - tables.mass[begin], tables.filled[end] - tables.filled[begin]};
}

// TVM. Q is grouped from the window with its first bin emptied; the bins of group g that P fills
// get q_g = S_g/n_g, mass and number of the group's non-empty bins. So the empty bins of P and Q
// agree and cancel, except where an edge bin holds outliers alone.
template <int Lanes>
struct TvmCandidates {
  Window window[Lanes];
  double p_less[Lanes], q_less[Lanes], q_total[Lanes];  // what smoothing takes per bin; total of Q
  InnerGroups<Lanes> groups;
  LogSums<Lanes> sum;

  TE_HD static Group first_group(const Tables& tables, const Window& w) {
    return group_between(tables, w.begin + 1, w.begin + w.merged);
  }
  TE_HD static Group last_group(const Tables& tables, const Window& w) {
    return group_between(tables, w.begin + (tables.levels - 1) * w.merged, w.end);
  }
  TE_HD void start(const Tables& tables, int lane, int64_t i) {
    const Window w = make_window(tables, i);
    const Group first = first_group(tables, w), last = last_group(tables, w);
    const Group own = group_between(tables, w.begin + 1, w.end);
    // Edge bins that are non-empty only in P get their group's mean too, if the group is not empty.
    const double added_first = first.bins > 0 && w.first > 0 ? 1.0 : 0.0;
    const double added_last = last.bins > 0 ? w.only_beyond() : 0.0;
    q_total[lane] = own.mass + added_first * (first.mass / larger(first.bins, 1.0)) +
                    added_last * (last.mass / larger(last.bins, 1.0));
    q_less[lane] = deduction(tables, w.bins(), own.bins + added_first + added_last);
    p_less[lane] = w.deducted;
    window[lane] = w;
    groups.start(lane, w);
    sum.start(lane);
  }
  TE_HD void sum_groups(const Tables& tables) {
    groups.rewind(tables);
    for (int64_t g = 1; g < tables.levels - 1; ++g) {
      for (int lane = 0; lane < Lanes; ++lane) {
        groups.next(tables.mass, tables.filled, lane);
        const double q = groups.mass[lane] - q_less[lane] * groups.bins[lane];
        sum.add(lane, groups.mass[lane] - p_less[lane] * groups.bins[lane],
                core::log_ratio(at_least_tiny(q), at_least_tiny(groups.bins[lane])));
      }
    }
  }
  TE_HD double log_q(const Tables& tables, int lane, const Group& group) const {
    if (!(group.bins > 0)) return core::log(tables.smoothing);
    return core::log_ratio(group.mass - q_less[lane] * group.bins, group.bins).value();
  }
  TE_HD double divergence(const Tables& tables, int lane) const {
    const Window& w = window[lane];
    const double less = p_less[lane];
    if (less < 0 || q_less[lane] < 0) return __builtin_inf();
    const Group first = first_group(tables, w), last = last_group(tables, w);
    const double first_mass = first.mass - less * first.bins + (w.first > 0 ? w.first - less : 0.0);
    const double last_mass = last.mass - less * last.bins + w.beyond - w.only_beyond() * less;
    const double cross = sum.value(lane) + first_mass * log_q(tables, lane, first) +
                         last_mass * log_q(tables, lane, last);
    return divergence_of(tables, window_entropy(tables, w), cross, q_total[lane]);
  }
};

// ONNX Runtime. Every bin of group g, empty or not, gets q_g = floor(S_g / n_g): S_g the group's
// mass (the last group's with the remainder's), n_g the bins that P fills. The remainder's bins get
// nothing.
template <int Lanes>
struct OnnxCandidates {
  Window window[Lanes];
  double width[Lanes];  // merged
  double p_less[Lanes], q_less[Lanes];
  double q_filled[Lanes], q_total[Lanes];  // non-empty groups of Q; sum of their means
  InnerGroups<Lanes> groups;
  LogSums<Lanes> sum;

  TE_HD static double mean(double unit, double per_unit, double mass, double bins) {
    return bins > 0 ? __builtin_floor(mass / larger(bins, 1.0) * per_unit) * unit : 0.0;
  }

  // What the loop over the inner groups does not cover: P on the first group, the last group and
  // the remainder.
  struct Edges {
    Group first, last, remainder;
    double remainder_bins;
    double first_mean, last_mean;
  };
  TE_HD static Edges edges(const Tables& tables, const Window& w) {
    const int64_t from = w.begin + (tables.levels - 1) * w.merged, to = from + w.merged;
    const double per_unit = 1.0 / tables.unit;
    Edges e;
    e.first = group_between(tables, w.begin, w.begin + w.merged);
    e.last = group_between(tables, from, to);
    e.remainder = group_between(tables, to, w.end);
    e.remainder_bins = static_cast<double>(w.end - to);
    const double first_mass = e.first.mass, last_mass = e.last.mass + e.remainder.mass;
    // The window's first bin may be non-empty only in P. Its last bin is in the remainder, if there
    // is one.
    const double first_own = tables.mass[w.begin + 1] - tables.mass[w.begin];
    e.first.bins += w.first > 0 && !(first_own > 0) ? 1.0 : 0.0;
    e.first.mass += tables.mass[w.begin];
    Group& end = to == w.end ? e.last : e.remainder;
    end.mass += w.beyond;
    end.bins += w.only_beyond();
    e.first_mean = mean(tables.unit, per_unit, first_mass, e.first.bins);
    e.last_mean = mean(tables.unit, per_unit, last_mass, e.last.bins);
    return e;
  }

  TE_HD void start(const Tables& tables, int lane, int64_t i) {
    const Window w = make_window(tables, i);
    window[lane] = w;
    width[lane] = static_cast<double>(w.merged);
    p_less[lane] = w.deducted;
    q_less[lane] = -1;
    q_filled[lane] = q_total[lane] = 0;
    groups.start(lane, w);
    sum.start(lane);
  }
  // Smoothing of Q needs all groups first.
  TE_HD void sum_groups(const Tables& tables) {
    const double unit = tables.unit, per_unit = 1.0 / unit;
    groups.rewind(tables);
    for (int64_t g = 1; g < tables.levels - 1; ++g) {
      for (int lane = 0; lane < Lanes; ++lane) {
        groups.next(tables.mass, tables.filled, lane);
        const double q = mean(unit, per_unit, groups.mass[lane], groups.bins[lane]);
        q_filled[lane] += q > 0 ? 1.0 : 0.0;
        q_total[lane] += q;
      }
    }
    for (int lane = 0; lane < Lanes; ++lane) close_means(tables, lane);
    groups.rewind(tables);
    for (int64_t g = 1; g < tables.levels - 1; ++g) {
      for (int lane = 0; lane < Lanes; ++lane) {
        groups.next(tables.mass, tables.filled, lane);
        const Group group = {groups.mass[lane], groups.bins[lane]};
        const double q = mean(unit, per_unit, group.mass, group.bins);
        sum.add(lane, smoothed_mass(tables.smoothing, lane, group, width[lane]),
                core::log_ratio(smoothed_mean(tables.smoothing, lane, q), 1.0));
      }
    }
  }
  TE_HD void close_means(const Tables& tables, int lane) {
    const Edges e = edges(tables, window[lane]);
    q_filled[lane] += (e.first_mean > 0 ? 1.0 : 0.0) + (e.last_mean > 0 ? 1.0 : 0.0);
    q_total[lane] = (q_total[lane] + e.first_mean + e.last_mean) * width[lane];
    q_less[lane] = deduction(tables, window[lane].bins(), q_filled[lane] * width[lane]);
  }
  // Mass of smoothed P on a group of `bins` bins; the value of smoothed Q there.
  TE_HD double smoothed_mass(double smoothing, int lane, const Group& group, double bins) const {
    return group.mass - p_less[lane] * group.bins + smoothing * (bins - group.bins);
  }
  TE_HD double smoothed_mean(double smoothing, int lane, double q) const {
    return q > 0 ? at_least_tiny(q - q_less[lane]) : smoothing;
  }
  TE_HD double divergence(const Tables& tables, int lane) const {
    const Window& w = window[lane];
    if (p_less[lane] < 0 || q_less[lane] < 0) return __builtin_inf();
    const Edges e = edges(tables, w);
    const double added = tables.smoothing, log_added = core::log(added);
    const double cross = sum.value(lane) +
                         smoothed_mass(added, lane, e.first, width[lane]) *
                             core::log(smoothed_mean(added, lane, e.first_mean)) +
                         smoothed_mass(added, lane, e.last, width[lane]) *
                             core::log(smoothed_mean(added, lane, e.last_mean)) +
                         smoothed_mass(added, lane, e.remainder, e.remainder_bins) * log_added;
    const double p_sum = window_entropy(tables, w) + (w.bins() - w.filled) * added * log_added;
    return divergence_of(tables, p_sum, cross, q_total[lane]);
  }
};

}  // namespace torch_ext::observers::kl_reference
