#pragma once

#include <cstdint>

#include "core/cumulative.h"
#include "core/grid.h"
#include "observers/kl_reference.h"

namespace torch_ext::cpu {

// Room for any search rule's prepared search.
struct SearchStorage {
  alignas(16) unsigned char bytes[512];
};

// Rules by index in the registry, compiled once per instruction set.
struct SolveKernels {
  core::View (*view)(core::HistogramLayout layout, core::Needs needs, const float* extrema,
                     const int64_t* tally, const int64_t* counts, int64_t* words);
  // The range by a closed rule; `words` holds solve_words() words.
  core::Range (*closed)(int32_t rule, const core::View& view, const core::Grid& grid,
                        const double* options, int64_t* words);
  // A search, in steps: number of candidates, objectives of some, threshold of the least.
  int64_t (*prepare)(int32_t rule, const core::View& view, const core::Grid& grid,
                     const double* options, int64_t* words, SearchStorage* search);
  void (*objectives)(int32_t rule, const SearchStorage& search, int64_t begin, int64_t end,
                     double* out);
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
