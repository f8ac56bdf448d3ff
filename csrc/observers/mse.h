#pragma once

#include "core/contract.h"
#include "core/lattice.h"
#include "core/qparams.h"

namespace torch_ext::observers {

// The threshold with the least squared error of quantizing the histogram's values on the grid.
struct Mse : core::NoOptions {
  static constexpr const char* name = "mse";
  static constexpr core::Needs needs = core::Needs::moments;
  static constexpr int max_bits = 8;

  // A sum of terms that are not negative, as computed, is at least this share of the same sum in
  // another order, and of any part of it: a candidate has at most 2^11 terms, each off by at most
  // 2^-46 of itself (octave_error() subtracts nothing that is larger than a few times its result).
  static constexpr double kSure = 1 + 0x1p-30;

  // The levels of one sign, in units of the scale: level 0 is 0. `middle` is between a level and
  // the next one.
  struct Integers {
    TE_HD explicit Integers(const core::Codes&) {}
    TE_HD double value(int32_t level) const { return level; }
    TE_HD double middle(int32_t level) const { return level + 0.5; }
  };
  struct Floats {
    core::FloatFormat format;
    TE_HD explicit Floats(const core::Codes& codes) : format(codes.format) {}
    TE_HD double value(int32_t level) const { return core::format_value(format, level); }
    TE_HD double middle(int32_t level) const { return (value(level) + value(level + 1)) / 2; }
  };

  // One sign's values on the levels 0, 1, .. levels.
  template <int kLanes, class Levels>
  struct Side {
    const core::View& view;
    core::Sign sign;
    int32_t levels;
    double scale;
    Levels level;

    // So many levels are faster one by one.
    static constexpr int32_t kFew = kLanes == 1 ? 1 : 3;

    // The squared error of the values on the first levels, and the window bin that the next begins
    // at.
    struct Sum {
      double error = 0;
      int64_t begin = 0;
    };

    TE_HD int64_t end_of(int32_t i) const { return view.position(level.middle(i) * scale); }
    TE_HD double value_of(int32_t i) const { return level.value(i) * scale; }
    // Squared error of the values on the last level, and beyond it.
    TE_HD double clipped() const {
      const int64_t begin = levels == 0 ? 0 : end_of(levels - 1);
      return core::squared_error(view, sign, begin, view.bins, value_of(levels));
    }
    // Squared error of the values beyond the last level.
    TE_HD double beyond() const {
      const double last = value_of(levels);
      return core::squared_error(view, sign, view.position(last), view.bins, last);
    }
    // Adds up to kLanes levels from `first` on, without the last.
    TE_HD void add_levels(int32_t first, Sum& sum) const {
      const int32_t count = levels - first < kLanes ? levels - first : kLanes;
      if (count <= 0 || sum.begin >= view.bins) return;
      if (count > kFew && !view.is_wide()) return add_lanes(first, count, sum);
      for (int32_t i = first; i < first + count; ++i) {
        const int64_t end = end_of(i);
        sum.error += core::squared_error(view, sign, sum.begin, end, value_of(i));
        sum.begin = end;
      }
    }

   private:
    // The same side by side. A level inside one octave takes the sums at both its ends, as
    // core::squared_error() does; few span two.
    TE_HD void add_lanes(int32_t first, int32_t count, Sum& sum) const {
      const int32_t m = view.layout.mantissa_bits;
      int64_t edge[kLanes + 1], below[kLanes + 1], s1[kLanes + 1], s2[kLanes + 1];
      double error[kLanes];
      edge[0] = sum.begin;
      for (int i = 0; i < kLanes; ++i) edge[i + 1] = end_of(first + i);
      for (int i = 0; i <= kLanes; ++i) {
        const int64_t last = view.bins - 1, inside = edge[i] < last ? edge[i] : last;
        const int64_t at = inside + (inside >> m);  // a row has one element more than bins
        below[i] = view.below[sign][edge[i]];
        s1[i] = view.first[sign][at];
        s2[i] = view.second[sign][at];
      }
      for (int i = 0; i < kLanes; ++i) {
        const int32_t exponent = view.bottom - core::kBias - m + static_cast<int32_t>(edge[i] >> m);
        const double far = core::exp2_of(m + 2);
        const double v = value_of(first + i) * core::exp2_of(-exponent);
        const core::Prefix sums = {below[i + 1] - below[i], s1[i + 1] - s1[i], s2[i + 1] - s2[i]};
        error[i] =
            core::near_octave_error(sums, v < far ? v : far, m) * core::exp2_of(2 * exponent);
      }
      for (int i = 0; i < count; ++i) {
        if (edge[i] >> m != edge[i + 1] >> m)
          error[i] = core::squared_error(view, sign, edge[i], edge[i + 1], value_of(first + i));
        sum.error += error[i];
      }
      sum.begin = edge[count];
    }
  };

  // The values of both signs on the levels of a range's qparams.
  template <int kLanes, class Levels>
  struct Sides {
    using Own = Side<kLanes, Levels>;
    Own side[2];
    double clipped[2];

    TE_HD Sides(const core::View& view, const core::Grid& grid, const core::Range& range)
        : Sides(view, grid, core::qparams(range, grid)) {}
    TE_HD Sides(const core::View& view, const core::Grid& grid, const core::QParams& q)
        : side{{view, core::kNegative, levels_of(grid, q.zero_point - grid.quant_min),
                double{q.scale}, Levels(grid)},
               {view, core::kPositive, levels_of(grid, grid.quant_max - q.zero_point),
                double{q.scale}, Levels(grid)}},
          clipped{side[0].clipped(), side[1].clipped()} {}

    TE_HD double cut() const { return clipped[0] + clipped[1]; }
    TE_HD double beyond() const { return side[0].beyond() + side[1].beyond(); }
    // The squared error; may be infinite where it is more than `limit`.
    TE_HD double error(double limit) const {
      if (cut() > limit) return __builtin_inf();
      typename Own::Sum sum[2];
      const int32_t most = side[0].levels > side[1].levels ? side[0].levels : side[1].levels;
      for (int32_t first = 0; first < most; first += kLanes) {
        for (int s = 0; s < 2; ++s) side[s].add_levels(first, sum[s]);
        if (sum[0].error + sum[1].error + cut() > limit) return __builtin_inf();
      }
      return (sum[0].error + clipped[0]) + (sum[1].error + clipped[1]);
    }
  };

  // How many levels follow 0: `integers` of them, or those of the float format.
  TE_HD static int32_t levels_of(const core::Grid& grid, int32_t integers) {
    return grid.is_float() ? core::format_values(grid.format) : integers;
  }

  // Squared error of quantizing with the qparams of a range, divided by the sum of squares of the
  // values.
  TE_HD static double relative_error(const core::View& view, const core::Grid& grid,
                                     const core::Range& range) {
    if (!(view.squares > 0)) return 0;
    const double error = grid.is_float()
                             ? Sides<1, Floats>(view, grid, range).error(__builtin_inf())
                             : Sides<1, Integers>(view, grid, range).error(__builtin_inf());
    return error / view.squares;
  }

  struct Search {
    core::View view;
    core::Grid grid;
    core::Lattice lattice;
    int64_t count;
    static constexpr bool last_wins = false;
    static constexpr bool bounded = true;
  };
  TE_HD static int64_t search_words(core::HistogramLayout, const core::Grid&, const double*) {
    return 0;
  }
  TE_HD static int64_t max_candidates(core::HistogramLayout layout) {
    return core::lattice_size(layout);
  }
  TE_HD static Search prepare(const core::View& view, const core::Grid& grid, const double*,
                              int64_t*) {
    const core::Lattice lattice = core::make_lattice(view);
    return {view, grid, lattice, lattice.count};
  }
  TE_HD static double threshold(const Search& search, int64_t i) {
    return core::lattice_value(search.lattice.bottom, search.lattice.first + i);
  }
  // The same bits for any kLanes.
  template <int kLanes>
  TE_HD static void objectives(const Search& search, int64_t begin, int64_t end, double bound,
                               double* out) {
    if (search.grid.is_float())
      objectives_on<kLanes, Floats>(search, begin, end, bound, out);
    else
      objectives_on<kLanes, Integers>(search, begin, end, bound, out);
  }

 private:
  template <int kLanes, class Levels>
  TE_HD static void objectives_on(const Search& search, int64_t begin, int64_t end, double bound,
                                  double* out) {
    const core::View& view = search.view;
    const double limit = bound * view.squares * kSure;
    for (int64_t i = end - 1; i >= begin; --i) {
      if (!(view.squares > 0)) {
        out[i] = 0;
        continue;
      }
      const core::Range range = core::range_of_threshold(view, threshold(search, i));
      const Sides<kLanes, Levels> sides(view, search.grid, range);
      out[i] = sides.error(limit) / view.squares;
      // With a smaller threshold at least as much is beyond the ends of a symmetric grid.
      if (!search.grid.symmetric || !(sides.cut() > limit) || !(sides.beyond() > limit)) continue;
      while (i > begin) out[--i] = __builtin_inf();
    }
  }
};
static_assert(core::SearchRule<Mse>);

}  // namespace torch_ext::observers
