#pragma once

#include <cstddef>
#include <cstdint>

#include "core/job.h"
#include "observers/kl_reference_tables.h"

// A cudaStream_t points to this type of the CUDA runtime. Declared here, at global scope, because
// the alias below would otherwise declare a type of its own namespace.
struct CUstream_st;

// The CUDA drivers, on raw pointers to memory of the current device and without torch. Every call
// only enqueues work on `stream`; it does not allocate and does not wait, so it can be captured
// into a CUDA graph. Results have the same bits as the CPU drivers'. CUDA errors are thrown as
// std::runtime_error, one for want of memory as OutOfMemory (errors.h). A build without CUDA links
// unavailable.cpp instead.
namespace torch_ext::cuda {

using core::SolveJob;
using core::Statistic;
using core::TensorView;
using Stream = CUstream_st*;

// Whether this build has CUDA kernels.
bool available();

// Options of observe().
struct ObserveMode {
  // The statistic's memory is uninitialised and is taken as an empty statistic.
  bool fresh = false;
  // A flag on the device, or null. Where it is set nothing is observed.
  const uint8_t* unless = nullptr;
};

// Adds the values of x to the statistic; `ch_axis` -1: per tensor. One launch. `scratch` is
// uninitialised memory of observe_scratch() bytes.
size_t observe_scratch(const TensorView& x, int32_t ch_axis, const Statistic& into);
void observe(const TensorView& x, int32_t ch_axis, const Statistic& into, ObserveMode mode,
             void* scratch, Stream stream);

// Adds another statistic of the same shape. One launch.
void merge(const Statistic& into, const Statistic& from, Stream stream);

// Solves all jobs, with one launch for every 128 jobs. A statistic that contradicts itself
// (core/solution.h) gives NaN. Scratch takes at most 256 MiB: rows beyond that wait for their turn
// within the launch.
size_t solve_scratch(const SolveJob* jobs, int64_t count);
void solve(const SolveJob* jobs, int64_t count, void* scratch, Stream stream);

// Ranges [channels, 2] to scales and zero points [channels]. An invalid range gives scale NaN, and
// so does an invalid tensor_scale [1], of a grid that has one; else null.
void qparams(const float* range, int64_t channels, const core::Grid& grid,
             const float* tensor_scale, float* scale, int32_t* zero_point, Stream stream);

// The kl thresholds of linear histograms counts [rows, bins] with bins of width bin_width [rows]:
// index [rows], the bins kept, and threshold [rows]. An invalid row gives -1 and NaN.
size_t kl_threshold_scratch(int64_t rows, int64_t bins, int64_t levels,
                            observers::KlVariant variant);
void kl_threshold(const int64_t* counts, const double* bin_width, int64_t rows, int64_t bins,
                  int64_t levels, observers::KlVariant variant, int64_t* index, double* threshold,
                  void* scratch, Stream stream);

// out = dequantize(quantize(x)) of contiguous data; where job.mask is not null, also one bit per
// element: whether its gradient passes. An invalid scale, or a zero point off the grid, gives NaN.
void fake_quant_forward(core::DType dtype, const core::FakeQuantJob& job, Stream stream);

// Fake-quant of groups with the scales of their own values: in one pass and one launch for groups
// of multiples of 8 values, aligned to 16 bytes, else in two.
size_t dynamic_scratch(const core::DynamicJob& job);
void dynamic_fake_quant(core::DType dtype, const core::DynamicJob& job, void* scratch,
                        Stream stream);

// dx = grad where the bit is set, else 0.
void fake_quant_backward(core::DType dtype, const void* grad, const uint8_t* mask, void* dx,
                         int64_t numel, Stream stream);

// dx of a learned fake-quant and the sums over each channel, in one pass and one launch.
size_t learned_backward_scratch(const core::LearnedJob& job);
void learned_backward(core::DType dtype, const core::LearnedJob& job, void* scratch, Stream stream);

// The tangent of a learned fake-quant's output. One launch.
void learned_tangent(core::DType dtype, const core::TangentJob& job, Stream stream);

// Observe, solve(job) and fake_quant_forward(map) in one launch and one pass over memory.
// follows_on_chip() tells whether that is possible: the rule reads extrema, each channel is one
// contiguous row, and a row fits in shared memory. map.scale and map.zero_point have to be those of
// the job; its statistic may be uninitialised.
bool follows_on_chip(int32_t rule, core::DType dtype, const core::FakeQuantJob& map);
void follow_on_chip(const SolveJob& job, core::DType dtype, const core::FakeQuantJob& map,
                    Stream stream);

}  // namespace torch_ext::cuda
