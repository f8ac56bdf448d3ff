#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include "core/job.h"
#include "cpu/subnormals.h"
#include "cuda/driver.h"
#include "observers/kl_reference_tables.h"

namespace torch_ext::bindings {

// The device split: calls the CPU drivers, or the CUDA drivers on the current stream of the
// tensors' device, with that device as the current one. Operands have been checked already.
class Backend {
 public:
  Backend(const char* op, const at::Tensor& on);

  bool is_cuda() const { return device_.is_cuda(); }

  // On the CPU `into` has to be initialised and `mode` is ignored.
  void observe(const core::TensorView& x, int64_t ch_axis, const core::Statistic& into,
               cuda::ObserveMode mode = {}) const;
  void merge(const core::Statistic& into, const core::Statistic& from) const;
  void solve(const std::vector<core::SolveJob>& jobs) const;
  void qparams(const at::Tensor& range, const core::Grid& grid,
               const std::optional<at::Tensor>& tensor_scale, at::Tensor& scale,
               at::Tensor& zero_point) const;
  void kl_threshold(const at::Tensor& counts, const at::Tensor& bin_width, int64_t levels,
                    observers::KlVariant variant, at::Tensor& index, at::Tensor& threshold) const;
  void fake_quant_forward(core::DType dtype, const core::FakeQuantJob& job) const;
  void dynamic_fake_quant(core::DType dtype, const core::DynamicJob& job) const;
  // Whether follow_on_chip() can run: it moves the range and quantizes the data in one pass over
  // memory. On the CPU job.statistic has to be initialised.
  bool follows_on_chip(int32_t rule, core::DType dtype, const core::FakeQuantJob& map) const;
  void follow_on_chip(const core::SolveJob& job, core::DType dtype,
                      const core::FakeQuantJob& map) const;
  void fake_quant_backward(core::DType dtype, const void* grad, const uint8_t* mask, void* dx,
                           int64_t numel) const;
  void learned_backward(core::DType dtype, const core::LearnedJob& job) const;
  void learned_tangent(core::DType dtype, const core::TangentJob& job) const;

 private:
  template <class Work>
  void on_stream(const Work& work) const;
  at::Tensor scratch(size_t bytes) const;

  const char* const op_;
  const at::Device device_;
  const c10::OptionalDeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
  const cpu::KeepSubnormals keep_;  // for what the CPU drivers do outside of parallel_for()
};

}  // namespace torch_ext::bindings
