#pragma once

#include <cstdint>

#include "core/job.h"
#include "cpu/map.h"

// The driver of fake-quant whose scales come from the values themselves. Results depend neither on
// the number of threads nor on the instruction set.
namespace torch_ext::cpu {

// Inner loops, compiled once per instruction set; those over values are indexed by DType. Values
// are rows of `n`, one behind the other.
struct DynamicKernels {
  // The largest magnitude of each row, rounded to float32. Not finite where a value is not.
  using Bounds = void (*)(const void* x, int64_t n, int64_t rows, float* bounds);
  // The least and the largest value of each row, rounded to float32. One of them is not finite
  // where a value is not.
  using Extrema = void (*)(const void* x, int64_t n, int64_t rows, float* least, float* largest);
  Bounds bounds[core::kDTypeCount];
  Extrema extrema[core::kDTypeCount];
  // core::qparams() of the ranges [-bound, bound] on a symmetric grid.
  void (*scales)(const core::Grid& grid, float tensor_scale, const float* bounds, int64_t rows,
                 float* scales);
  // Fake-quant of rows [1, channels, inner] of whole groups of 64 bytes (of the computing type),
  // rounded half to even, with scales that are valid or NaN. `ahead` elements further on is what is
  // read next.
  using Map = void (*)(const MapTask& task, int64_t ahead);
  Map map[core::kDTypeCount];
};

void dynamic_fake_quant(core::DType dtype, const core::DynamicJob& job);

}  // namespace torch_ext::cpu
