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

  // Squared error of one sign's values on the levels 0, scale, 2 scale, .. `levels` scale.
  TE_HD static double side_error(const core::View& view, core::Sign sign, int32_t levels,
                                 double scale) {
    double total = 0;
    int64_t begin = 0;
    for (int32_t r = 0; r < levels && begin < view.bins; ++r) {
      const int64_t end = view.position((r + 0.5) * scale);
      total += core::squared_error(view, sign, begin, end, r * scale);
      begin = end;
    }
    return total + core::squared_error(view, sign, begin, view.bins, levels * scale);
  }

  // Squared error of quantizing with the qparams of a range, divided by the sum of squares of the
  // values.
  TE_HD static double relative_error(const core::View& view, const core::Grid& grid,
                                     const core::Range& range) {
    if (!(view.squares > 0)) return 0;
    const core::QParams q = core::qparams(range, grid);
    const double scale = static_cast<double>(q.scale);
    const double negative = side_error(view, core::kNegative, q.zero_point - grid.quant_min, scale);
    return (negative + side_error(view, core::kPositive, grid.quant_max - q.zero_point, scale)) /
           view.squares;
  }

  struct Search {
    core::View view;
    core::Grid grid;
    core::Lattice lattice;
    int64_t count;
    static constexpr bool last_wins = false;
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
  template <int>
  TE_HD static void objectives(const Search& search, int64_t begin, int64_t end, double* out) {
    for (int64_t i = begin; i < end; ++i)
      out[i] = relative_error(search.view, search.grid,
                              core::range_of_threshold(search.view, threshold(search, i)));
  }
};
static_assert(core::SearchRule<Mse>);

}  // namespace torch_ext::observers
