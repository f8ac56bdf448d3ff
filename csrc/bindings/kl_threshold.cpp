#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "bindings/backend.h"
#include "bindings/checks.h"

namespace torch_ext::bindings {
namespace {

constexpr const char* kOp = "kl_threshold";

observers::KlVariant parse_variant(std::string_view name) {
  // In the order of KlVariant, without its first, log_linear: that searches a statistic, not a
  // histogram.
  constexpr const char* names[] = {"slides", "modelopt", "ncnn", "tvm", "onnxruntime", "horizon"};
  int32_t variant = 1;
  for (const char* known : names) {
    if (name == known) return static_cast<observers::KlVariant>(variant);
    ++variant;
  }
  expect(false, kOp, "variant", "one of slides, modelopt, ncnn, tvm, onnxruntime, horizon", name);
  return observers::KlVariant::slides;
}

// Raises for counts whose sum float64 does not hold exactly, and for widths that are not positive
// and finite. On CUDA reading the values would wait for the device: there such a row gives index -1
// and threshold NaN.
void check_values(const at::Tensor& counts, const at::Tensor& bin_width) {
  if (!counts.is_cpu()) return;
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
  const observers::KlVariant variant = parse_variant({variant_name.data(), variant_name.size()});
  check_device(kOp, "counts", counts);
  expect(counts.scalar_type() == at::kLong, kOp, "counts", "Long", counts.scalar_type());
  expect(counts.dim() == 2 && counts.size(1) >= 1 && counts.size(1) <= (1 << 20), kOp, "counts",
         "of shape [N, B] with 1 to 2^20 bins", counts.sizes());
  expect(levels >= 2 && levels <= 65536, kOp, "levels", "between 2 and 65536", levels);
  const int64_t rows = counts.size(0), bins = counts.size(1);
  expect(levels <= bins, kOp, "levels", "at most the bins of counts", levels, " for ", bins,
         " bins");
  check_per_channel(kOp, "bin_width", bin_width, at::kDouble, rows, counts.device());
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
