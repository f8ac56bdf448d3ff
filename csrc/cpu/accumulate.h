#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/half.h"
#include "core/histogram.h"

namespace torch_ext::cpu {

// Values are processed in groups that stay in the first-level cache between the passes over them.
constexpr int kGroup = 1024;
// The same without a histogram: larger, because there is only one pass.
constexpr int kLongGroup = 1 << 14;
// Extra bins behind those of both signs for the values outside the window. There is one per lane,
// because a run of zeros in one bin would wait for its own increments.
constexpr int kSpill = 64;

// The result of one pass over a group.
struct GroupSummary {
  int32_t min_key;
  int32_t max_key;
  int32_t zeros;
  int32_t in_window;

  bool finite() const { return min_key >= core::kMinFiniteKey && max_key <= core::kMaxFiniteKey; }
};

// Counters of one thread. They have 8 bits, so that the bins in use stay in the first-level cache,
// and a carry that counts 256s for each bin. There are two tables, for even and odd positions, so
// that equal neighbouring values do not wait for each other.
struct NarrowTables {
  uint8_t* even;    // [size + kSpill]
  uint8_t* odd;     // [size + kSpill]
  uint32_t* carry;  // [size + kSpill]
};

// Inner loops, compiled once per instruction set.
struct AccumulateKernels {
  // Extrema and zeros of n values.
  GroupSummary (*summarize)(const float* x, int64_t n);
  // Folds rows of n values, one value per channel, into the channels' extrema and zeros.
  void (*summarize_rows)(const float* x, int64_t rows, int64_t stride, int64_t n, int32_t* min_key,
                         int32_t* max_key, int32_t* zeros);
  // As summarize; also writes the index of each value: its bin in `counts`, or a spill bin.
  GroupSummary (*classify)(const float* x, int64_t n, core::Window window, uint32_t* index);
  // One increment per index.
  void (*count)(const uint32_t* index, int64_t n, NarrowTables tables);
  // n values of another type to float32.
  void (*widen_f64)(const double* x, int64_t n, float* out);
  void (*widen_f16)(const core::half* x, int64_t n, float* out);
  void (*widen_bf16)(const core::bfloat16* x, int64_t n, float* out);
};

}  // namespace torch_ext::cpu
