#include <algorithm>

#include "cuda/block.h"
#include "cuda/driver.h"
#include "gpu.h"
#include "observers/kl_reference.h"

// Threshold searches on linear histograms, one block per row.
namespace torch_ext::cuda {
namespace {

using observers::KlReference;
using observers::KlVariant;

struct KlThreshold {
  static constexpr int kThreads = 256;

  const int64_t* counts;    // [rows, bins]
  const double* bin_width;  // [rows]
  int64_t rows, bins, levels;
  KlVariant variant;
  int64_t* index;
  double* threshold;
  double* scratch;  // per block: the search's memory, then objectives
  int64_t stride;

  struct Shared {
    KlReference::Search search;
    double fold[kThreads / gpu::kWarp];
  };

  TE_GPU void operator()() const {
    for (int64_t row = gpu::block(); row < rows; row += gpu::blocks()) search_row(row);
  }

 private:
  TE_GPU void search_row(int64_t row) const {
    Shared& shared = *static_cast<Shared*>(gpu::shared());
    double* const memory = scratch + gpu::block() * stride;
    double* const objectives = memory + KlReference::scratch_size(variant, bins);
    gpu::sync();
    if (!is_histogram(row, shared)) {
      if (gpu::thread() == 0) {
        index[row] = -1;
        threshold[row] = static_cast<double>(__builtin_nanf(""));
      }
      return;
    }
    if (gpu::thread() == 0)
      shared.search = KlReference::prepare(variant, counts + row * bins, bins, levels, memory);
    gpu::sync();
    const KlReference::Search search = shared.search;
    for (int64_t i = gpu::thread(); i < search.count; i += kThreads)
      KlReference::objectives<1>(search, i, i + 1, objectives + i);
    gpu::sync();
    const int64_t winner =
        block_argmin<kThreads>(objectives, search.count, search.last_wins, shared.fold);
    if (gpu::thread() != 0) return;
    index[row] = KlReference::kept(search, winner);
    threshold[row] = KlReference::threshold(search, winner, bin_width[row]);
  }

  // The checks for which the op raises on the CPU: counts >= 0 whose sum is at most 2^53, a
  // positive finite width.
  TE_GPU bool is_histogram(int64_t row, Shared& shared) const {
    constexpr int64_t kMax = observers::kl_reference::kMaxCounts;
    int64_t total = 0;
    for (int64_t j = gpu::thread(); j < bins; j += kThreads) {
      const int64_t n = counts[row * bins + j];
      // Once a sum passes the bound or meets an invalid count it stays above the bound, so it
      // cannot overflow.
      total = n < 0 || n > kMax || total > kMax ? kMax + 1 : total + n;
    }
    total = block_fold<kThreads>(total, reinterpret_cast<int64_t*>(shared.fold),
                                 [](int64_t a, int64_t b) {
                                   const int64_t sum = a + b;
                                   return sum > kMax ? kMax + 1 : sum;
                                 });
    const double width = bin_width[row];
    return total <= kMax && width > 0 && width - width == 0;
  }
};

int64_t blocks_for(int64_t rows) {
  return std::clamp<int64_t>(rows, 1,
                             gpu::resident_blocks<KlThreshold>(sizeof(KlThreshold::Shared)));
}

int64_t stride_for(KlVariant variant, int64_t bins, int64_t levels) {
  return KlReference::scratch_size(variant, bins) +
         KlReference::candidate_count(variant, bins, levels);
}

}  // namespace

size_t kl_threshold_scratch(int64_t rows, int64_t bins, int64_t levels, KlVariant variant) {
  return blocks_for(rows) * stride_for(variant, bins, levels) * sizeof(double);
}

void kl_threshold(const int64_t* counts, const double* bin_width, int64_t rows, int64_t bins,
                  int64_t levels, KlVariant variant, int64_t* index, double* threshold,
                  void* scratch, Stream stream) {
  if (rows == 0) return;
  const KlThreshold kernel{counts,
                           bin_width,
                           rows,
                           bins,
                           levels,
                           variant,
                           index,
                           threshold,
                           static_cast<double*>(scratch),
                           stride_for(variant, bins, levels)};
  gpu::launch("kl_threshold", kernel, {blocks_for(rows), sizeof(KlThreshold::Shared)}, stream);
}

}  // namespace torch_ext::cuda
