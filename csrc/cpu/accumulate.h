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
// Channels that summarize_channels() reads together.
constexpr int kChannelsAtOnce = 16;
// Indices that classify() may write beyond those that count.
constexpr int kIndexPadding = 16;
// Bins that drain() handles at once: a divisor of the bins of an octave or 32, the least.
constexpr int kDrained = 32;

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
  uint8_t* even;     // [size]
  uint8_t* odd;      // [size]
  uint32_t* carry;   // [size]
  uint8_t* carried;  // [size / kDrained] whether one of these carries may not be zero

  NarrowTables from(int64_t bin) const {  // a multiple of kDrained
    return {even + bin, odd + bin, carry + bin, carried + bin / kDrained};
  }
};

// Extrema and zeros of several channels.
struct ChannelSummaries {
  int32_t* min_key;
  int32_t* max_key;
  int32_t* zeros;
};

// Inner loops, compiled once per instruction set.
struct AccumulateKernels {
  // Extrema and zeros of n values.
  GroupSummary (*summarize)(const float* x, int64_t n);
  // n <= kGroup.
  GroupSummary (*summarize_f16)(const core::half* x, int64_t n);
  GroupSummary (*summarize_bf16)(const core::bfloat16* x, int64_t n);
  // Folds rows of n values, one value per channel, into the channels' summaries.
  void (*summarize_rows)(const float* x, int64_t rows, int64_t stride, int64_t n,
                         ChannelSummaries into);
  // Folds one row of n values for each channel into its summary. The arrays of `into` have room for
  // a multiple of kChannelsAtOnce.
  void (*summarize_channels)(const float* x, int64_t stride, int64_t n, int64_t channels,
                             ChannelSummaries into);
  // Extends extrema [channels, 2] and tally [channels, 5] by the summaries of `values` values a
  // channel. Stops at the first register of channels with one that is not finite, or at the last
  // ones, and returns how many channels are done.
  int64_t (*extend_channels)(ChannelSummaries from, int64_t channels, int64_t values,
                             float* extrema, int64_t* tally);
  // As summarize; also writes the bins of the values inside the window, in order. Their number is
  // in_window.
  GroupSummary (*classify)(const float* x, int64_t n, core::Window window, uint16_t* index);
  // The zeros, of either sign, among n values of a 16-bit type; and the others, in order, of which
  // it returns the number. `out` may be x.
  int64_t (*count_zeros)(const uint16_t* x, int64_t n);
  int64_t (*drop_zeros)(const uint16_t* x, int64_t n, uint16_t* out);
  // One increment per index.
  void (*count)(const uint16_t* index, int64_t n, NarrowTables tables);
  void (*count_wide)(const uint16_t* index, int64_t n, int64_t* counts);
  // Whether one of the first `bins` bins, a multiple of kDrained, is not empty.
  bool (*any)(NarrowTables tables, int64_t bins);
  // Clears the counters of the first `bins` bins, a multiple of kDrained, adds them to `counts`
  // unless it is null, and returns their sum.
  int64_t (*drain)(NarrowTables tables, int64_t bins, int64_t* counts);
  // n values of another type to float32.
  void (*widen_f64)(const double* x, int64_t n, float* out);
  void (*widen_f16)(const core::half* x, int64_t n, float* out);
  void (*widen_bf16)(const core::bfloat16* x, int64_t n, float* out);
};

}  // namespace torch_ext::cpu
