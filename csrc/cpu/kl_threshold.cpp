#include <vector>

#include "core/lattice.h"
#include "cpu/driver.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace torch_ext::cpu {

using observers::KlReference;

void kl_threshold(const int64_t* counts, const double* bin_width, int64_t rows, int64_t bins,
                  int64_t levels, observers::KlVariant variant, int64_t* index, double* threshold) {
  const SolveKernels& k = kernels().solve;
  const int64_t scratch_size = KlReference::scratch_size(variant, bins);
  const auto search_row = [&](int64_t row, bool parallel) {
    std::vector<double> scratch(scratch_size);
    KlReference::Search search;
    const int64_t count =
        k.linear_prepare(variant, counts + row * bins, bins, levels, scratch.data(), &search);
    std::vector<double> objectives(count);
    const auto evaluate = [&](int64_t begin, int64_t end) {
      k.linear_objectives(search, begin, end, objectives.data() + begin);
    };
    constexpr int64_t kGrain = 128;
    if (parallel)
      parallel_for(0, count, kGrain, evaluate);
    else
      evaluate(0, count);
    const int64_t winner = core::argmin(objectives.data(), count, search.last_wins);
    index[row] = KlReference::kept(search, winner);
    threshold[row] = KlReference::threshold(search, winner, bin_width[row]);
  };
  if (rows < 2 * num_threads()) {
    for (int64_t row = 0; row < rows; ++row) search_row(row, true);
  } else {
    parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) search_row(row, false);
    });
  }
}

}  // namespace torch_ext::cpu
