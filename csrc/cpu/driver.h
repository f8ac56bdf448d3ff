#pragma once

#include <cstdint>

#include "core/affine.h"
#include "core/dtype.h"
#include "core/grid.h"
#include "core/histogram.h"

// The CPU drivers: raw pointers in, no torch. Results do not depend on the number of threads.
namespace torch_ext::cpu {

struct TensorView {
  const void* data;
  core::DType dtype;
  int32_t ndim;
  const int64_t* sizes;    // [ndim]
  const int64_t* strides;  // [ndim], in elements, >= 0
};

// A statistic of `channels` channels; `layout.octaves` 0 means that counts is not kept (null).
struct Statistic {
  float* extrema;   // [channels, 2]
  int64_t* tally;   // [channels, 5]
  int64_t* counts;  // [channels, 2, octaves, 2^mantissa_bits]
  int64_t channels;
  core::HistogramLayout layout;

  core::ChannelStatistic channel(int64_t c) const {
    return {extrema + 2 * c, tally + core::kTallyColumns * c,
            counts == nullptr ? nullptr : counts + c * layout.size()};
  }
};

// Adds the values of x to the statistic; `ch_axis` -1 is per tensor.
void observe(const TensorView& x, int32_t ch_axis, const Statistic& into);

// Adds the values behind another statistic of the same shape.
void merge(const Statistic& into, const Statistic& from);

// One quantizer to solve. `options` holds the rule's option values. Outputs per channel; where `solved` is
// not null the range follows: it moves by averaging_constant towards the solved one (all the way while
// *solved is 0), and a channel without values leaves it.
struct SolveJob {
  int32_t rule;
  core::Grid grid;
  const double* options;
  Statistic statistic;
  float* range;         // [channels, 2]
  float* scale;         // [channels] or null
  int32_t* zero_point;  // [channels] or null
  uint8_t* solved;      // [1] or null
  double averaging_constant;
};
void solve(const SolveJob* jobs, int64_t count);

// index [rows] and threshold [rows] of linear histograms counts [rows, bins] of width bin_width [rows].
void kl_threshold(const int64_t* counts, const double* bin_width, int64_t rows, int64_t bins,
                  int32_t levels, int32_t variant, int64_t* index, double* threshold);

}  // namespace torch_ext::cpu
