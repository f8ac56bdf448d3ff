#include "cpu/gptq.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "bindings/contracts.h"
#include "cpu/subnormals.h"

namespace torch_ext::bindings {
namespace {

constexpr const char* kOp = "gptq";

// Raises for a scale or zero point that no quantizer can have, and for a factor of no inverse.
void check_values(const at::Tensor& factor, const cpu::GptqJob& job) {
  const core::Codes& codes = job.codes;
  const int64_t* const s = job.scale_strides;
  const int64_t* const z = job.zero_point_strides;
  for (int64_t g = 0; g < job.groups; ++g) {
    for (int64_t r = 0; r < job.rows; ++r)
      for (int64_t i = 0; i < job.inputs; ++i) {
        const float scale = job.scale[g * s[0] + r * s[1] + i * s[2]];
        const int32_t zero_point = job.zero_point[g * z[0] + r * z[1] + i * z[2]];
        expect(core::is_valid_scale(scale), kOp, "scale", "positive and finite", scale, " in row ",
               r, " of group ", g);
        expect(codes.has_zero_point(zero_point), kOp, "zero_point",
               codes.is_float() ? "0 on a float format" : "between quant_min and quant_max",
               zero_point, " in row ", r, " of group ", g);
      }
    const double* const own = factor.const_data_ptr<double>() + g * job.inputs * job.inputs;
    for (int64_t i = 0; i < job.inputs; ++i) {
      const double pivot = own[i * job.inputs + i];
      expect(pivot > 0 && std::isfinite(pivot), kOp, "factor",
             "positive and finite on the diagonal", pivot, " in row ", i, " of group ", g);
    }
  }
}

at::Tensor gptq(const at::Tensor& weight, const at::Tensor& factor, const at::Tensor& scale,
                const at::Tensor& zero_point, c10::string_view grid) {
  const GptqContract contract = check_gptq(weight, factor, scale, zero_point, grid);
  const cpu::KeepSubnormals keep;
  const c10::MaybeOwned<at::Tensor> weights = weight.expect_contiguous();
  const c10::MaybeOwned<at::Tensor> factors = factor.expect_contiguous();
  at::Tensor out = at::empty(weight.sizes(), weight.options());
  cpu::GptqJob job{weight.size(0),
                   weight.size(1),
                   weight.size(2),
                   weights->const_data_ptr(),
                   out.mutable_data_ptr(),
                   factors->const_data_ptr<double>(),
                   scale.const_data_ptr<float>(),
                   zero_point.const_data_ptr<int32_t>(),
                   {},
                   {},
                   contract.codes,
                   contract.rounding};
  std::ranges::copy(scale.strides(), job.scale_strides);
  std::ranges::copy(zero_point.strides(), job.zero_point_strides);
  check_values(*factors, job);
  cpu::gptq(contract.dtype, job);
  return out;
}

// There is no kernel for CUDA: each input of a row waits for the one before it, and the weights are
// few. It is computed on the CPU and copied back, which waits for the device.
at::Tensor gptq_of_cuda(const at::Tensor& weight, const at::Tensor& factor, const at::Tensor& scale,
                        const at::Tensor& zero_point, c10::string_view grid) {
  check_gptq(weight, factor, scale, zero_point, grid);
  const auto here = [](const at::Tensor& t) { return t.to(at::kCPU); };
  return gptq(here(weight), here(factor), here(scale), here(zero_point), grid).to(weight.device());
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("gptq", TORCH_FN(gptq)); }
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("gptq", TORCH_FN(gptq_of_cuda)); }

}  // namespace torch_ext::bindings
