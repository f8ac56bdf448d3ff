#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "bindings/backend.h"
#include "bindings/contracts.h"
#include "cpu/subnormals.h"

namespace torch_ext::bindings {
namespace {

constexpr const char* kOp = "kl_threshold";

// Raises for counts whose sum float64 does not hold exactly, and for widths that are not positive
// and finite. On CUDA reading the values would wait for the device: there such a row gives index -1
// and threshold NaN.
void check_values(const at::Tensor& counts, const at::Tensor& bin_width) {
  if (!counts.is_cpu()) return;
  const cpu::KeepSubnormals keep;
  const int64_t* const histogram = counts.const_data_ptr<int64_t>();
  const double* const widths = bin_width.const_data_ptr<double>();
  const int64_t rows = counts.size(0), bins = counts.size(1);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t total = 0;
    for (int64_t j = 0; j < bins; ++j) {
      const int64_t count = histogram[row * bins + j];
      expect(count >= 0 && count <= observers::kl_reference::kMaxCounts, kOp, "counts",
             "between 0 and 2^53", count, " in row ", row, ", bin ", j);
      total += count;
      expect(total <= observers::kl_reference::kMaxCounts, kOp, "counts", "at most 2^53 in sum",
             total, " in row ", row);
    }
    expect(widths[row] > 0 && std::isfinite(widths[row]), kOp, "bin_width", "positive and finite",
           widths[row], " in row ", row);
  }
}

std::tuple<at::Tensor, at::Tensor> kl_threshold(const at::Tensor& counts,
                                                const at::Tensor& bin_width, int64_t levels,
                                                c10::string_view variant_name) {
  const observers::KlVariant variant = check_kl_threshold(counts, bin_width, levels, variant_name);
  const int64_t rows = counts.size(0);
  const c10::MaybeOwned<at::Tensor> data = counts.expect_contiguous();
  check_values(*data, bin_width);
  at::Tensor index = at::empty({rows}, counts.options());
  at::Tensor threshold = at::empty({rows}, bin_width.options());
  Backend(kOp, counts).kl_threshold(*data, bin_width, levels, variant, index, threshold);
  return {index, threshold};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("kl_threshold", TORCH_FN(kl_threshold)); }
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("kl_threshold", TORCH_FN(kl_threshold)); }

}  // namespace torch_ext::bindings
