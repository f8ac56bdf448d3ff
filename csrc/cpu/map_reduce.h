#pragma once

#include <cstdint>

#include "core/job.h"

// The drivers of the derivatives of learned fake-quants. Backward: dx and the sums over each
// channel, in one pass over x; sums are taken in the order of core/learned.h, so they do not depend
// on the number of threads. Tangent: its transpose.
namespace torch_ext::cpu {

// Inner loops, compiled once per instruction set; indexed by DType.
struct MapReduceKernels {
  // Values [begin, begin + count) of the data, of one channel, count <= core::kSumLength.
  using Run = void (*)(const core::LearnedJob& job, int64_t channel, int64_t begin, int64_t count,
                       double* parameter, double* zero_point);
  // All channels of outer rows [begin, end). Channel c's sums go to parameter[c * stride] and
  // zero_point[c * stride].
  using Rows = void (*)(const core::LearnedJob& job, int64_t begin, int64_t end, int64_t stride,
                        double* parameter, double* zero_point);
  // Elements [begin, end).
  using Tangent = void (*)(const core::TangentJob& job, int64_t begin, int64_t end);
  Run run[core::kDTypeCount];
  Rows rows[core::kDTypeCount];
  Tangent tangent[core::kDTypeCount];
};

void learned_backward(core::DType dtype, const core::LearnedJob& job);

void learned_tangent(core::DType dtype, const core::TangentJob& job);

}  // namespace torch_ext::cpu
