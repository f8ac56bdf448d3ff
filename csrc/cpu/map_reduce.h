#pragma once

#include <cstdint>

#include "core/job.h"

// The driver of the backward of learned fake-quants: dx and the sums over each channel, in one pass
// over x. Sums are taken in the order of core/learned.h, so they do not depend on the number of
// threads.
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
  Run run[core::kDTypeCount];
  Rows rows[core::kDTypeCount];
};

void learned_backward(core::DType dtype, const core::LearnedJob& job);

}  // namespace torch_ext::cpu
