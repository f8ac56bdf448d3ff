#include "bindings/backend.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <stdexcept>

#include "bindings/checks.h"
#include "bindings/enqueue.h"
#include "core/qparams.h"
#include "cpu/driver.h"
#include "cpu/dynamic.h"
#include "cpu/map.h"
#include "cpu/map_reduce.h"

namespace torch_ext::bindings {

// The stream comes through LibTorch's device-generic interface, so no CUDA header is needed here.
Backend::Backend(const char* op, const at::Tensor& on)
    : op_(op),
      device_(on.device()),
      guard_(on.is_cuda() ? std::optional<at::Device>(on.device()) : std::nullopt) {
  if (is_cuda())
    stream_ = static_cast<cuda::Stream>(
        c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).native_handle());
}

template <class Work>
void Backend::on_stream(const Work& work) const {
  enqueue(op_, device_, work);
}

at::Tensor Backend::scratch(size_t bytes) const {
  return at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions(device_).dtype(at::kByte));
}

void Backend::observe(const core::TensorView& x, int64_t ch_axis, const core::Statistic& into,
                      cuda::ObserveMode mode) const {
  const int32_t axis = static_cast<int32_t>(ch_axis);
  if (!is_cuda()) return cpu::observe(x, axis, into);
  on_stream([&] {
    const at::Tensor memory = scratch(cuda::observe_scratch(x, axis, into));
    cuda::observe(x, axis, into, mode, memory.mutable_data_ptr(), stream_);
  });
}

void Backend::merge(const core::Statistic& into, const core::Statistic& from) const {
  if (!is_cuda()) return cpu::merge(into, from);
  on_stream([&] { cuda::merge(into, from, stream_); });
}

void Backend::solve(const std::vector<core::SolveJob>& jobs) const {
  const int64_t count = static_cast<int64_t>(jobs.size());
  if (!is_cuda()) {
    try {
      cpu::solve(jobs.data(), count);
    } catch (const std::invalid_argument& bad) {  // a statistic that contradicts itself
      TORCH_CHECK(false, op_, ": ", bad.what());
    }
    return;
  }
  on_stream([&] {
    const at::Tensor memory = scratch(cuda::solve_scratch(jobs.data(), count));
    cuda::solve(jobs.data(), count, memory.mutable_data_ptr(), stream_);
  });
}

void Backend::qparams(const at::Tensor& range, const core::Grid& grid,
                      const std::optional<at::Tensor>& tensor_scale, at::Tensor& scale,
                      at::Tensor& zero_point) const {
  const int64_t channels = range.size(0);
  const float* const ends = range.const_data_ptr<float>();
  float* const scales = scale.mutable_data_ptr<float>();
  int32_t* const zero_points = zero_point.mutable_data_ptr<int32_t>();
  const float* const unit =
      grid.has_tensor_scale() ? tensor_scale->const_data_ptr<float>() : nullptr;
  if (is_cuda())
    return on_stream(
        [&] { cuda::qparams(ends, channels, grid, unit, scales, zero_points, stream_); });
  for (int64_t c = 0; c < channels; ++c) {
    const core::Range ends_of{ends[2 * c], ends[2 * c + 1]};
    expect(core::is_valid_range(ends_of), op_, "range", "finite and in order", ends_of.lo, " to ",
           ends_of.hi, " in channel ", c);
    const core::QParams q = core::qparams(ends_of, grid, unit == nullptr ? 0 : *unit);
    scales[c] = q.scale;
    zero_points[c] = q.zero_point;
  }
}

void Backend::kl_threshold(const at::Tensor& counts, const at::Tensor& bin_width, int64_t levels,
                           observers::KlVariant variant, at::Tensor& index,
                           at::Tensor& threshold) const {
  const int64_t rows = counts.size(0), bins = counts.size(1);
  const int64_t* const histogram = counts.const_data_ptr<int64_t>();
  const double* const width = bin_width.const_data_ptr<double>();
  int64_t* const indices = index.mutable_data_ptr<int64_t>();
  double* const thresholds = threshold.mutable_data_ptr<double>();
  if (!is_cuda())
    return cpu::kl_threshold(histogram, width, rows, bins, levels, variant, indices, thresholds);
  on_stream([&] {
    const at::Tensor memory = scratch(cuda::kl_threshold_scratch(rows, bins, levels, variant));
    cuda::kl_threshold(histogram, width, rows, bins, levels, variant, indices, thresholds,
                       memory.mutable_data_ptr(), stream_);
  });
}

void Backend::fake_quant_forward(core::DType dtype, const core::FakeQuantJob& job) const {
  if (!is_cuda()) return cpu::fake_quant_forward(dtype, job);
  on_stream([&] { cuda::fake_quant_forward(dtype, job, stream_); });
}

void Backend::dynamic_fake_quant(core::DType dtype, const core::DynamicJob& job) const {
  if (!is_cuda()) return cpu::dynamic_fake_quant(dtype, job);
  on_stream([&] {
    const at::Tensor memory = scratch(cuda::dynamic_scratch(job));
    cuda::dynamic_fake_quant(dtype, job, memory.mutable_data_ptr(), stream_);
  });
}

bool Backend::follows_on_chip(int32_t rule, core::DType dtype,
                              const core::FakeQuantJob& map) const {
  if (!is_cuda()) return cpu::follows_on_chip(rule, dtype, map);
  bool follows = false;
  on_stream([&] { follows = cuda::follows_on_chip(rule, dtype, map); });
  return follows;
}

void Backend::follow_on_chip(const core::SolveJob& job, core::DType dtype,
                             const core::FakeQuantJob& map) const {
  if (!is_cuda()) return cpu::follow_on_chip(job, dtype, map);
  on_stream([&] { cuda::follow_on_chip(job, dtype, map, stream_); });
}

void Backend::fake_quant_backward(core::DType dtype, const void* grad, const uint8_t* mask,
                                  void* dx, int64_t numel) const {
  if (!is_cuda()) return cpu::fake_quant_backward(dtype, grad, mask, dx, numel);
  on_stream([&] { cuda::fake_quant_backward(dtype, grad, mask, dx, numel, stream_); });
}

void Backend::learned_backward(core::DType dtype, const core::LearnedJob& job) const {
  if (!is_cuda()) return cpu::learned_backward(dtype, job);
  on_stream([&] {
    const at::Tensor memory = scratch(cuda::learned_backward_scratch(job));
    cuda::learned_backward(dtype, job, memory.mutable_data_ptr(), stream_);
  });
}

void Backend::learned_tangent(core::DType dtype, const core::TangentJob& job) const {
  if (!is_cuda()) return cpu::learned_tangent(dtype, job);
  on_stream([&] { cuda::learned_tangent(dtype, job, stream_); });
}

}  // namespace torch_ext::bindings
