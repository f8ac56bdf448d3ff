#pragma once

#include "core/contract.h"
#include "core/lattice.h"
#include "core/log.h"

namespace torch_ext::observers {

// The threshold whose quantized distribution loses the least information (Kullback-Leibler divergence).
// `log_linear` searches the log-linear statistic with a constant number of bins per level, outliers spread
// over the last level, and the bias of sampling noise removed: continuous in the threshold and free of the
// data's unit. The other variants are those of kl_reference.h, on the statistic's linear view.
struct Kl {
  static constexpr const char* name = "kl";
  static constexpr core::Needs needs = core::Needs::counts;
  static constexpr int max_bits = 8;
  // tvm and onnxruntime search a signed histogram, which kl_threshold takes and a statistic of |x| is not.
  static constexpr const char* variants[] = {"log_linear", "slides", "modelopt", "ncnn", "horizon"};
  static constexpr core::Option options[] = {{"variant", 0, 0, 4, variants, 5}};
  static constexpr int32_t option_count = 1;

  static constexpr int kBinsPerLevel = 8;
  static constexpr int kMaxLevels = 256;

  TE_HD static int levels(const core::View& view, const core::Grid& grid) {
    const bool whole = view.one_sided() && (grid.is_unsigned() || !grid.symmetric);
    return 1 << (whole ? grid.bits() : grid.bits() - 1);
  }

  // What one level adds to N times the divergence, and how many of its bins hold values.
  struct Level {
    double term;
    double occupied;
  };

  // Level g of candidate T with bins of width `step`; `outliers` values beyond T go to its occupied bins in
  // equal parts. kept = F(T), values = N.
  TE_HD static Level level(const core::View& view, double step, int g, double outliers, double kept,
                           double values) {
    double count[kBinsPerLevel], sum = 0, occupied = 0;
    double below = view.count_below(step * (kBinsPerLevel * g));
#pragma GCC unroll 8
    for (int b = 0; b < kBinsPerLevel; ++b) {
      const double next = view.count_below(step * (kBinsPerLevel * g + b + 1));
      count[b] = next - below;
      below = next;
      sum += count[b];
      occupied += count[b] > 0 ? 1.0 : 0.0;
    }
    const double bins = occupied > 0 ? occupied : 1.0;
    const double extra = outliers / bins;
    // p / q = (c + o) / N * F(T) / (S / M)
    const double ratio = kept * bins / (values * (sum > 0 ? sum : 1.0));
    double term = 0;
#pragma GCC unroll 8
    for (int b = 0; b < kBinsPerLevel; ++b) {
      const double mass = count[b] + extra;
      const double log_ratio = core::log((count[b] > 0 ? mass : 1.0) * ratio);
      term += count[b] > 0 ? mass * log_ratio : 0.0;
    }
    return {term, occupied};
  }

  TE_HD static double log_linear(const core::View& view, int levels, double t) {
    const double values = static_cast<double>(core::nonzero(view));
    const double kept = view.count_below(t), outliers = values - kept;
    const double step = t / (kBinsPerLevel * levels);
    double term[kMaxLevels], occupied[kMaxLevels];
    const int last = levels - 1;
    for (int g = 0; g < last; ++g) {
      const Level found = level(view, step, g, 0.0, kept, values);
      term[g] = found.term;
      occupied[g] = found.occupied;
    }
    const Level end = level(view, step, last, outliers, kept, values);
    if (outliers > 0 && !(end.occupied > 0)) return __builtin_inf();
    term[last] = end.term;
    occupied[last] = end.occupied;
    // Eight sums side by side, then in pairs: the order on every device.
    double sum[8] = {}, spare[8] = {};
    for (int g = 0; g < levels; ++g) {
      sum[g & 7] += term[g];
      spare[g & 7] += occupied[g] > 0 ? occupied[g] - 1 : 0.0;
    }
    return (pairwise(sum) - 0.5 * pairwise(spare)) / values;
  }
  TE_HD static double pairwise(const double (&s)[8]) {
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
  }

  struct Search {
    core::View view;
    core::Lattice lattice;
    int levels;
    int64_t count;
    static constexpr bool last_wins = false;
  };
  TE_HD static int64_t search_words(core::HistogramLayout, const core::Grid&, const double*) {
    return 0;
  }
  TE_HD static Search prepare(const core::View& view, const core::Grid& grid, const double*,
                              int64_t*) {
    const core::Lattice lattice = core::make_lattice(view);
    return {view, lattice, levels(view, grid), lattice.count};
  }
  TE_HD static double threshold(const Search& search, int64_t i) {
    return core::lattice_value(search.lattice.bottom, search.lattice.first + i);
  }
  TE_HD static void objectives(const Search& search, int64_t begin, int64_t end, double* out) {
    for (int64_t i = begin; i < end; ++i)
      out[i] = log_linear(search.view, search.levels, threshold(search, i));
  }
};
static_assert(core::SearchRule<Kl>);

}  // namespace torch_ext::observers
