#pragma once

#include <cstdint>

#include "core/job.h"
#include "observers/kl_reference_tables.h"

// The CPU drivers, on raw pointers and without torch. Results do not depend on the number of
// threads.
namespace torch_ext::cpu {

using core::SolveJob;
using core::Statistic;
using core::TensorView;

// Adds the values of x to the statistic; `ch_axis` -1: per tensor.
void observe(const TensorView& x, int32_t ch_axis, const Statistic& into);

// Adds another statistic of the same shape.
void merge(const Statistic& into, const Statistic& from);

// Solves all jobs. Throws std::invalid_argument for a statistic that contradicts itself
// (core/solution.h).
void solve(const SolveJob* jobs, int64_t count);

// Observe, solve(job) and fake_quant_forward(map) in one pass over memory, a few channels at a
// time. follows_on_chip() tells whether that is possible and pays: the rule reads extrema, each
// channel is one row of map.x, rows fit in a core's cache, and there are enough of them for all
// threads. job.statistic has to be initialised; job.solved and map.scale and zero_point, those of
// the job, are not null.
bool follows_on_chip(int32_t rule, core::DType dtype, const core::FakeQuantJob& map);
void follow_on_chip(const SolveJob& job, core::DType dtype, const core::FakeQuantJob& map);

// The kl thresholds of linear histograms counts [rows, bins] with bins of width bin_width [rows]:
// index [rows], the bins kept, and threshold [rows].
void kl_threshold(const int64_t* counts, const double* bin_width, int64_t rows, int64_t bins,
                  int64_t levels, observers::KlVariant variant, int64_t* index, double* threshold);

}  // namespace torch_ext::cpu
