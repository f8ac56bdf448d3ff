#pragma once

#include <cstdint>

#include "core/job.h"
#include "core/parts.h"

// The drivers of the derivatives of learned fake-quants. Backward: dx and the sums over each
// channel, in one pass over x; sums are taken in the order of core/learned.h, so they do not depend
// on the number of threads. Tangent: its transpose.
namespace torch_ext::cpu {

// Outer rows [begin, end) of channels [first_channel, end_channel).
struct RowRange {
  int64_t begin, end;
  int64_t first_channel, end_channel;
};

// Inner loops, compiled once per instruction set; indexed by DType.
struct MapReduceKernels {
  // Values [begin, begin + count) of the data, of one channel, count <= core::kSumLength. Sums that
  // the job does not want are not written.
  using Run = void (*)(const core::LearnedJob& job, int64_t channel, int64_t begin, int64_t count,
                       double* parameter, double* clipped);
  // Whole parts of rows shorter than core::kLongRow. Adds to sums [parts, channels].
  using Rows = void (*)(const core::LearnedJob& job, const core::Parts& parts,
                        const RowRange& range, double* parameter, double* clipped);
  // Elements [begin, end).
  using Tangent = void (*)(const core::TangentJob& job, int64_t begin, int64_t end);
  // Rows of at most kStagedRow elements.
  using TangentRows = void (*)(const core::TangentJob& job, const RowRange& range);
  Run run[core::kDTypeCount];
  Rows rows[core::kDTypeCount];
  Tangent tangent[core::kDTypeCount];
  TangentRows tangent_rows[core::kDTypeCount];
};

// For rows up to this length what a channel's tangents need is computed once for many rows.
constexpr int64_t kStagedRow = 256;

void learned_backward(core::DType dtype, const core::LearnedJob& job);

void learned_tangent(core::DType dtype, const core::TangentJob& job);

}  // namespace torch_ext::cpu
