#pragma once

#include <cstdint>

#include "core/cumulative.h"
#include "core/grid.h"
#include "observers/kl_reference.h"

namespace torch_ext::cpu {

// Memory for the prepared search of any search rule.
struct SearchStorage {
  alignas(16) unsigned char bytes[512];
};

// The rules, by their index in the registry, compiled once per instruction set.
struct SolveKernels {
  core::View (*view)(core::HistogramLayout layout, core::Needs needs, const float* extrema,
                     const int64_t* tally, const int64_t* counts, int64_t* words);
  // The range by a closed or composite rule; `words` has work_words() words (rule_table.h).
  core::Range (*closed)(int32_t rule, const core::View& view, const core::Grid& grid,
                        const double* options, int64_t* words);
  // The steps of a search: prepare and return the number of candidates, bound the objective of the
  // winner (using `out` as memory), compute the objectives of candidates [begin, end), infinite
  // where more than `bound`, return the threshold of the best.
  int64_t (*prepare)(int32_t rule, const core::View& view, const core::Grid& grid,
                     const double* options, int64_t* words, SearchStorage* search);
  double (*bound)(int32_t rule, const SearchStorage& search, double* out);
  void (*objectives)(int32_t rule, const SearchStorage& search, int64_t begin, int64_t end,
                     double bound, double* out);
  double (*threshold)(int32_t rule, const core::View& view, const SearchStorage& search,
                      const double* objectives);

  // The same steps for a reference variant of kl on a linear histogram.
  int64_t (*linear_prepare)(observers::KlVariant variant, const int64_t* counts, int64_t bins,
                            int64_t levels, double* scratch,
                            observers::KlReference::Search* search);
  void (*linear_objectives)(const observers::KlReference::Search& search, int64_t begin,
                            int64_t end, double* out);
};

}  // namespace torch_ext::cpu
