#pragma once

#include <cstddef>
#include <cstdint>

#include "core/job.h"
#include "observers/kl_reference_tables.h"

// The CUDA run time's name of a stream: declared out here, or the alias below would declare
// another.
struct CUstream_st;

struct CUstream_st;  // a cudaStream_t points to one

// The CUDA drivers: raw pointers to the current device's memory in, no torch. Every call only
// enqueues work on `stream`: nothing is allocated, nothing waits, so all of it can be captured into
// a graph. Results have the same bits as the CPU drivers'. What fails is thrown as
// std::runtime_error. A build without CUDA links unavailable.cpp, which has the same declarations.
namespace torch_ext::cuda {

using core::SolveJob;
using core::Statistic;
using core::TensorView;
using Stream = CUstream_st*;

// Whether this build has CUDA kernels.
bool available();

// How observe() runs besides its operands.
struct ObserveMode {
  // The statistic's memory holds nothing yet: it is taken as empty.
  bool fresh = false;
  // A flag on the device, or null: nothing is done where it is set.
  const uint8_t* unless = nullptr;
};

// Adds the values of x to the statistic; `ch_axis` -1 is per tensor. One launch. `scratch` has
// observe_scratch() bytes, which may hold anything.
size_t observe_scratch(const TensorView& x, int32_t ch_axis, const Statistic& into);
void observe(const TensorView& x, int32_t ch_axis, const Statistic& into, ObserveMode mode,
             void* scratch, Stream stream);

// Adds the values behind another statistic of the same shape. One launch.
void merge(const Statistic& into, const Statistic& from, Stream stream);

// Solves all jobs: one launch for each 128 jobs or 256 MiB of scratch. A statistic that contradicts
// itself gives NaN.
size_t solve_scratch(const SolveJob* jobs, int64_t count);
void solve(const SolveJob* jobs, int64_t count, void* scratch, Stream stream);

// Ranges [channels, 2] to scales and zero points [channels]. An invalid range gives scale NaN.
void qparams(const float* range, int64_t channels, const core::Grid& grid, float* scale,
             int32_t* zero_point, Stream stream);

// index [rows] and threshold [rows] of linear histograms counts [rows, bins] of width bin_width
// [rows].
size_t kl_threshold_scratch(int64_t rows, int64_t bins, int64_t levels,
                            observers::KlVariant variant);
void kl_threshold(const int64_t* counts, const double* bin_width, int64_t rows, int64_t bins,
                  int64_t levels, observers::KlVariant variant, int64_t* index, double* threshold,
                  void* scratch, Stream stream);

// out = dequantize(quantize(x)) of contiguous data, and where job.mask is not null one bit per
// element: the gradient passes. An invalid scale, or a zero point off the grid, gives NaN.
void fake_quant_forward(core::DType dtype, const core::FakeQuantJob& job, Stream stream);

// dx = grad where the bit is set, else 0.
void fake_quant_backward(core::DType dtype, const void* grad, const uint8_t* mask, void* dx,
                         int64_t numel, Stream stream);

// dx of a learned fake-quant and the sums over each channel, in one pass and one launch.
size_t learned_backward_scratch(const core::LearnedJob& job);
void learned_backward(core::DType dtype, const core::LearnedJob& job, void* scratch, Stream stream);

// Observe, solve(job) and fake_quant_forward(map) in one launch and one pass over memory, where the
// rule reads extrema, each channel is one row and a row fits on chip. map.scale and map.zero_point
// are the job's; what its statistic holds before does not matter.
bool follows_on_chip(int32_t rule, core::DType dtype, const core::FakeQuantJob& map);
void follow_on_chip(const SolveJob& job, core::DType dtype, const core::FakeQuantJob& map,
                    Stream stream);

}  // namespace torch_ext::cuda
