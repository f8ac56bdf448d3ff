#pragma once

#include <cstdint>

#include "core/job.h"
#include "observers/kl_reference_tables.h"

// The CPU drivers: raw pointers in, no torch. Results do not depend on the number of threads.
namespace torch_ext::cpu {

using core::SolveJob;
using core::Statistic;
using core::TensorView;

// Adds the values of x to the statistic; `ch_axis` -1 is per tensor.
void observe(const TensorView& x, int32_t ch_axis, const Statistic& into);

// Adds the values behind another statistic of the same shape.
void merge(const Statistic& into, const Statistic& from);

// Solves all jobs. Throws std::invalid_argument where a statistic contradicts itself.
void solve(const SolveJob* jobs, int64_t count);

// index [rows] and threshold [rows] of linear histograms counts [rows, bins] of width bin_width
// [rows].
void kl_threshold(const int64_t* counts, const double* bin_width, int64_t rows, int64_t bins,
                  int64_t levels, observers::KlVariant variant, int64_t* index, double* threshold);

}  // namespace torch_ext::cpu
