#pragma once

#include <memory>
#include <optional>

#include "core/histogram.h"
#include "cpu/accumulate.h"

namespace torch_ext::cpu {

// Narrow tables of `size` bins, all zero, from a pool; their owner leaves them zero.
class Counters {
 public:
  explicit Counters(int64_t size);
  ~Counters();
  Counters(const Counters&) = delete;
  Counters& operator=(const Counters&) = delete;

  NarrowTables tables() const;

  // Between these two no other thread is inside of the pool: for fork(), whose child has only the
  // thread that forked.
  static void hold_pool();
  static void release_pool();

 private:
  struct Memory;
  class Pool;
  std::unique_ptr<Memory> memory_;
};

// The statistic of those values of one channel that one task reads. Values are counted in narrow
// tables, which finish() adds to the channel, or, with `direct` (few values, and no other task
// writes to the channel), straight in the channel's counts.
class Accumulator {
 public:
  Accumulator(const AccumulateKernels& kernels, core::HistogramLayout layout,
              core::ChannelStatistic target, bool direct);
  Accumulator(const Accumulator&) = delete;
  Accumulator& operator=(const Accumulator&) = delete;

  // The most values that add() takes.
  int64_t group() const { return layout_.octaves == 0 ? kLongGroup : kGroup; }
  void add(const float* x, int64_t n);
  bool extrema_only() const { return layout_.octaves == 0; }
  // Adds n finite values by their summary, where extrema_only().
  void add(const GroupSummary& s, int64_t n);
  // Adds the result to the channel; nothing may be added afterwards.
  void finish();

 private:
  void add_finite_of(const float* x, int64_t n);
  void set_top(int32_t top);
  void raise(int32_t top);
  int64_t drain(int32_t octave, int64_t* counts);

  const AccumulateKernels& kernels_;
  const core::HistogramLayout layout_;
  const core::ChannelStatistic target_;
  const bool direct_;
  std::optional<Counters> counters_;
  core::Window window_{};
  int32_t top_ = 0;
  int32_t min_key_ = INT32_MAX, max_key_ = INT32_MIN;
  int64_t tally_[core::kTallyColumns] = {};
  uint16_t index_[kGroup + kIndexPadding];  // written before it is read
};

}  // namespace torch_ext::cpu
