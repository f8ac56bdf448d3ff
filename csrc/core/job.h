#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/grid.h"
#include "core/histogram.h"
#include "core/unit_grid.h"

// Arguments of the drivers of both devices: raw pointers and sizes.
namespace torch_ext::core {

struct TensorView {
  const void* data;
  DType dtype;
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
  HistogramLayout layout;

  TE_HD ChannelStatistic channel(int64_t c) const {
    return {extrema + 2 * c, tally + kTallyColumns * c,
            counts == nullptr ? nullptr : counts + c * layout.size()};
  }
};

// One quantizer to solve. `options` holds the rule's option values. With `solved` null the outputs
// are overwritten. Else the range moves by the fraction averaging_constant from its value towards
// the newly solved one, all the way while *solved is 0, and a channel without values keeps its
// range; then *solved is set if a channel had values.
// With averaging_constant 0 a range is set once: while *solved is 0 a channel keeps its range as
// soon as that is not (0, 0), as it is after nothing but zeros, and *solved is set if a channel has
// such a range.
struct SolveJob {
  int32_t rule;
  Grid grid;
  const double* options;
  Statistic statistic;
  float* range;         // [channels, 2]
  float* scale;         // [channels] or null
  int32_t* zero_point;  // [channels] or null
  uint8_t* solved;      // [1] or null
  double averaging_constant;
};

// Contiguous data seen as [outer, channels, inner]; per tensor is [1, 1, n].
struct ChannelLayout {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  TE_HD int64_t numel() const { return outer * channels * inner; }
};

// Element-wise fake-quant of contiguous data; x and out must not overlap.
struct FakeQuantJob {
  const void* x;
  void* out;
  uint8_t* mask;  // [(numel + 7) / 8] or null; bit i % 8 of byte i / 8 is element i
  ChannelLayout layout;
  const float* scale;         // [channels]
  const int32_t* zero_point;  // [channels], or null: all 0
  Codes codes;
  Rounding rounding;
  Mask mask_kind;
  // Index in LearnedFakeQuants of the method whose learned parameter is in `scale`, which has no
  // mask and rounds half to even; -1: it is the scale.
  int32_t learned = -1;
};

// Fake-quant of contiguous data in groups of `group_size` values, each with the scale and the zero
// point of its own extrema; x and out must not overlap. A group with a value that is not finite in
// float32 becomes NaN.
struct DynamicJob {
  const void* x;
  void* out;
  uint8_t* mask;  // as in FakeQuantJob, of Mask::rounded; or null
  int64_t groups;
  int64_t group_size;
  Grid grid;
  Rounding rounding;
  const float* tensor_scale;  // [1] of a grid that has one; else null
};

// The part of a DynamicJob that has its scales.
inline FakeQuantJob with_scales(const DynamicJob& job, const float* scale,
                                const int32_t* zero_point) {
  return {job.x,    job.out,      job.mask,     {1, job.groups, job.group_size}, scale, zero_point,
          job.grid, job.rounding, Mask::rounded};
}

// Backward of a learned fake-quant on contiguous data; dx must not overlap x or grad. Gradients
// that are null are not computed; d_zero_point and d_mixed need d_parameter.
struct LearnedJob {
  int32_t method;  // index in LearnedFakeQuants
  const void* x;
  const void* grad;
  void* dx;  // or null
  ChannelLayout layout;
  const float* parameter;     // [channels]
  const int32_t* zero_point;  // [channels], or null: all 0
  Codes codes;
  double elements;      // per parameter, for its gradient scale; 0: no scaling
  float* d_parameter;   // [channels] or null
  float* d_zero_point;  // [channels] or null
  // [channels] or null: the gradient of the zero point divided by the scale, with the factor of the
  // parameter's gradient. The derivative of either gradient with regard to the other's input.
  float* d_mixed = nullptr;
};

// The transpose of LearnedJob, on contiguous data: the output's tangent given those of x and, per
// channel, of the parameter, of the zero point and of d_mixed. Tangents that are null are zero.
struct TangentJob {
  int32_t method;  // index in LearnedFakeQuants
  const void* x;
  const void* x_tangent;
  void* out;  // must not overlap x or x_tangent
  ChannelLayout layout;
  const float* parameter;     // [channels]
  const int32_t* zero_point;  // [channels], or null: all 0
  Codes codes;
  double elements;                  // as in LearnedJob
  const float* parameter_tangent;   // [channels]
  const float* zero_point_tangent;  // [channels]
  const float* mixed_tangent;       // [channels]
};

template <class Job>
TE_HD int32_t zero_point_of(const Job& job, int64_t channel) {
  return job.zero_point == nullptr ? 0 : job.zero_point[channel];
}

}  // namespace torch_ext::core
