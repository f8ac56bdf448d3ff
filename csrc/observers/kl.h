#pragma once

#include "core/contract.h"
#include "core/lattice.h"
#include "core/log.h"
#include "observers/kl_reference.h"

namespace torch_ext::observers {

// The threshold whose quantized distribution loses the least information (Kullback-Leibler
// divergence). `log_linear` searches the log-linear statistic itself: a constant number of bins per
// level, outliers spread over the last level, the bias of sampling noise subtracted. It is
// continuous in the threshold and nearly independent of the data's unit. The other variants are
// those of kl_reference.h, on a linear histogram made from the statistic.
struct Kl {
  static constexpr const char* name = "kl";
  static constexpr core::Needs needs = core::Needs::counts;
  static constexpr int max_bits = 8;
  static constexpr const char* only_integers = "it shares the values out among equal levels";
  // Without tvm and onnxruntime: those search a signed histogram, which only the op kl_threshold
  // takes.
  static constexpr const char* variants[] = {"log_linear", "slides", "modelopt", "ncnn", "horizon"};
  static constexpr core::Option options[] = {{"variant", 0, 0, 4, variants, 5}};
  static constexpr int32_t option_count = 1;

  static constexpr int kBinsPerLevel = 8;
  static constexpr int kMaxLevels = 256;

  TE_HD static int levels(const core::View& view, const core::Grid& grid) {
    const bool whole = view.one_sided() && (grid.is_unsigned() || !grid.symmetric);
    return 1 << (whole ? grid.bits() : grid.bits() - 1);
  }

  // The factor that makes a bin's mass c + o (its count and its outliers) the ratio p / q, with p =
  // (c + o) / N and q = (S / M) / F(T): S values in the M occupied bins of its level, F(T) values
  // kept, N in all.
  TE_HD static double level_ratio(double sum, double occupied, double kept, double values) {
    return kept * (occupied > 0 ? occupied : 1.0) / (values * (sum > 0 ? sum : 1.0));
  }
  // The term of a bin in N times the divergence: `count` values and, if there are any, `extra`
  // outliers.
  TE_HD static double bin_term(double count, double extra, double ratio) {
    const double mass = count + extra;
    const double log_ratio = core::log((count > 0 ? mass : 1.0) * ratio);
    return count > 0 ? mass * log_ratio : 0.0;
  }

  // Working memory of kLevels levels side by side: all levels where loops over them vectorise, one
  // in a GPU thread. A row holds bin b of each level.
  template <int kLevels>
  struct Rows {
    double below[kBinsPerLevel][kLevels + 1];  // F at the lower edge of the bin
    double sum[kLevels], occupied[kLevels], ratio[kLevels], term[kLevels];

    TE_HD const double* next_edge(int b) const {
      return b + 1 < kBinsPerLevel ? below[b + 1] : below[0] + 1;
    }
  };

  // Counts of levels first .. first + count - 1.
  template <int kLevels>
  TE_HD static void count_levels(const core::View& view, double step, int first, int count,
                                 Rows<kLevels>& rows) {
    for (int b = 0; b < kBinsPerLevel; ++b) {
      const int edges = b == 0 ? count + 1 : count;
      for (int g = 0; g < edges; ++g)
        rows.below[b][g] =
            view.count_below(step * static_cast<double>(kBinsPerLevel * (first + g) + b));
    }
    for (int g = 0; g < count; ++g) rows.sum[g] = rows.occupied[g] = 0;
    for (int b = 0; b < kBinsPerLevel; ++b) {
      const double* low = rows.below[b];
      const double* high = rows.next_edge(b);
      for (int g = 0; g < count; ++g) {
        const double n = high[g] - low[g];
        rows.sum[g] += n;
        rows.occupied[g] += n > 0 ? 1.0 : 0.0;
      }
    }
  }
  // Computes the terms of these levels. `outliers` go to the last of them; 0 where the candidate's
  // last level is not among them.
  template <int kLevels>
  TE_HD static void add_terms(double kept, double values, int count, double outliers,
                              Rows<kLevels>& rows) {
    const int last = count - 1;
    for (int g = 0; g < count; ++g) {
      rows.ratio[g] = level_ratio(rows.sum[g], rows.occupied[g], kept, values);
      rows.term[g] = 0;
    }
    const double extra = outliers > 0 ? outliers / rows.occupied[last] : 0.0;
    double last_term = 0;
    for (int b = 0; b < kBinsPerLevel; ++b) {
      const double* low = rows.below[b];
      const double* high = rows.next_edge(b);
      for (int g = 0; g < last; ++g) rows.term[g] += bin_term(high[g] - low[g], 0.0, rows.ratio[g]);
      last_term += bin_term(high[last] - low[last], extra, rows.ratio[last]);
    }
    rows.term[last] = last_term;
  }

  // A lower bound of the objective of candidate T. All levels but the last, and the last, are two
  // bins of the same P and Q: putting bins together never raises a divergence. A level has at most
  // kBinsPerLevel bins in use. The values in the last level are counted without rounding errors:
  // its edges are multiples of 2^-13 of a bin's width, and a view that is not wide has less than
  // 2^40 values. All other errors are relative ones far below kSlack.
  static constexpr double kSlack = 1e-9;
  TE_HD static double least_objective(const core::View& view, int levels, double t) {
    const double values = static_cast<double>(core::nonzero(view)), kept = view.count_below(t);
    const double last = kept - view.count_below(t / levels * (levels - 1));
    const double lower = kept - last, upper = last + (values - kept);
    if (!(last > 0 && lower > 0)) return -__builtin_inf();
    const double divergence =
        lower * core::log(kept / values) + upper * core::log(upper / values * (kept / last));
    return (divergence - 0.5 * (kBinsPerLevel - 1) * levels) / values - kSlack;
  }

  // The divergence of candidate T; infinite if there are outliers and the last level has no
  // occupied bin to take them.
  template <int kLevels>
  TE_HD static double log_linear(const core::View& view, int levels, double t) {
    const double values = static_cast<double>(core::nonzero(view));
    const double kept = view.count_below(t), outliers = values - kept;
    const double step = t / (kBinsPerLevel * levels);
    // Level l is added to sum l mod 8, and the eight sums in pairs: the same order on every device.
    double sum[8] = {}, spare[8] = {};
    for (int first = 0; first < levels; first += kLevels) {
      const int count = levels - first < kLevels ? levels - first : kLevels;
      Rows<kLevels> rows;
      count_levels(view, step, first, count, rows);
      const bool has_last = first + count == levels;
      if (has_last && outliers > 0 && !(rows.occupied[count - 1] > 0)) return __builtin_inf();
      add_terms(kept, values, count, has_last ? outliers : 0.0, rows);
      for (int g = 0; g < count; ++g) {
        sum[(first + g) & 7] += rows.term[g];
        spare[(first + g) & 7] += rows.occupied[g] > 0 ? rows.occupied[g] - 1 : 0.0;
      }
    }
    return (pairwise(sum) - 0.5 * pairwise(spare)) / values;
  }
  TE_HD static double pairwise(const double (&s)[8]) {
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
  }

  struct Search {
    core::View view;
    core::Lattice lattice;  // of log_linear
    int levels;
    KlReference::Search reference;  // of the other variants
    bool is_reference;
    int64_t count;
    bool last_wins;
    bool bounded;
  };

  // Number of bins of the linear histogram, which reaches to 2^(exponent of max|x| + 1). Its bins
  // have the width of the bins of the top octave.
  TE_HD static int64_t linear_bins(core::HistogramLayout layout) {
    return int64_t{2} << layout.mantissa_bits;
  }
  TE_HD static double linear_width(const core::View& view) {
    return core::exp2_of(view.top - core::kBias - view.layout.mantissa_bits);
  }
  // The linear histogram of |x|. Exact: every bin of a lower octave is inside one of its bins.
  TE_HD static void linear_view(const core::View& view, bool with_zeros, int64_t* counts) {
    const int32_t m = view.layout.mantissa_bits;
    const int64_t width = int64_t{1} << m, octaves = view.bins >> m;
    for (int64_t i = 0; i < 2 * width; ++i) counts[i] = 0;
    counts[0] = view.tiny + (with_zeros ? view.zeros : 0);
    for (int64_t i = 0; i < view.bins; ++i) {
      const int64_t both = view.below[core::kNegative][i + 1] - view.below[core::kNegative][i] +
                           view.below[core::kPositive][i + 1] - view.below[core::kPositive][i];
      counts[(width + (i & (width - 1))) >> (octaves - 1 - (i >> m))] += both;
    }
  }

  TE_HD static KlVariant variant_of(const double* options) {
    const int choice = static_cast<int>(options[0]);
    return choice == 4 ? KlVariant::horizon : static_cast<KlVariant>(choice);
  }
  TE_HD static core::Complaint complaint(const core::Grid& grid, core::HistogramLayout layout,
                                         const double* options) {
    if (variant_of(options) == KlVariant::log_linear || layout.octaves == 0) return {};
    if (layout.octaves <= layout.mantissa_bits)
      return {"variant", "0 (log_linear) where octaves are not more than mantissa_bits",
              options[0]};
    if (linear_bins(layout) < int64_t{1} << grid.bits())
      return {"variant", "0 (log_linear) where 2^(mantissa_bits+1) bins are fewer than levels",
              options[0]};
    return {};
  }

  TE_HD static int64_t search_words(core::HistogramLayout layout, const core::Grid&,
                                    const double* options) {
    const KlVariant variant = variant_of(options);
    if (variant == KlVariant::log_linear) return 0;
    return linear_bins(layout) + KlReference::scratch_size(variant, linear_bins(layout));
  }
  TE_HD static int64_t max_candidates(core::HistogramLayout layout) {
    const int64_t lattice = core::lattice_size(layout), linear = linear_bins(layout);
    return lattice > linear ? lattice : linear;
  }
  TE_HD static Search prepare(const core::View& view, const core::Grid& grid, const double* options,
                              int64_t* words) {
    const KlVariant variant = variant_of(options);
    Search search{};
    search.view = view;
    search.levels = levels(view, grid);
    search.is_reference = variant != KlVariant::log_linear;
    search.bounded = !search.is_reference && !view.is_wide();
    if (!search.is_reference) {
      search.lattice = core::make_lattice(view);
      search.count = search.lattice.count;
    } else if (view.top != 0) {
      const int64_t bins = linear_bins(view.layout);
      linear_view(view, variant != KlVariant::ncnn, words);
      search.reference = KlReference::prepare(variant, words, bins, search.levels,
                                              reinterpret_cast<double*>(words + bins));
      search.count = search.reference.count;
      search.last_wins = search.reference.last_wins;
    }
    return search;
  }
  TE_HD static double threshold(const Search& search, int64_t i) {
    if (search.is_reference)
      return KlReference::threshold(search.reference, i, linear_width(search.view));
    return core::lattice_value(search.lattice.bottom, search.lattice.first + i);
  }
  template <int kLanes>
  TE_HD static void objectives(const Search& search, int64_t begin, int64_t end, double bound,
                               double* out) {
    if (search.is_reference) {
      KlReference::objectives<kLanes>(search.reference, begin, end, out + begin);
      return;
    }
    constexpr int kLevels = kLanes == 1 ? 1 : kMaxLevels;
    for (int64_t i = begin; i < end; ++i) {
      const double t = threshold(search, i);
      const bool hopeless =
          bound < __builtin_inf() && least_objective(search.view, search.levels, t) > bound;
      out[i] = hopeless ? __builtin_inf() : log_linear<kLevels>(search.view, search.levels, t);
    }
  }
};
static_assert(core::SearchRule<Kl> && core::ChecksOptions<Kl>);

}  // namespace torch_ext::observers
