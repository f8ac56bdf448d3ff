#pragma once

#include <cstdint>

#include "core/histogram.h"
#include "cuda/tables.h"
#include "gpu.h"

// The statistic that one block accumulates, of up to kMaxGroupChannels channels. All values of a
// thread are of one channel. A thread's extrema and tally are in registers, the counters in shared
// memory. Between two chunks of values all threads raise the windows together.
namespace torch_ext::cuda {

constexpr int kMaxGroupChannels = 32;

// Extrema and tally of one channel.
struct Partial {
  int32_t min_key;
  int32_t max_key;
  int64_t tally[core::kTallyColumns];
};

// A block's shared memory; the counters are behind it.
struct BlockState {
  int32_t top[kMaxGroupChannels];       // top octave of the counters' window
  int32_t next_top[kMaxGroupChannels];  // top octave that the values seen so far need
  Partial totals[kMaxGroupChannels];
};

constexpr Partial kNothing = {0x7f800000, -0x7f800000 - 1, {}};  // keys of +inf and -inf

template <class Table>
constexpr bool kCounts = !std::is_same_v<Table, NoTable>;

// Accumulates chunks of kValues values per thread.
template <class Table, int kThreads, int kValues>
class Accumulator {
 public:
  TE_GPU Accumulator(BlockState& state, Table table, core::HistogramLayout layout, int channels)
      : state_(state),
        table_(table),
        layout_(layout),
        channels_(channels),
        channel_(gpu::thread() % channels) {}

  // Call before the first value. The window of channel c starts at octave top(c).
  template <class Top>
  TE_GPU void start(const Top& top) {
    if (gpu::thread() < channels_) {
      const int c = gpu::thread();
      state_.top[c] = state_.next_top[c] = top(c);
      state_.totals[c] = kNothing;
    }
    if constexpr (kCounts<Table>) {
      for (int64_t i = gpu::thread(); i < channels_ * layout_.size(); i += kThreads)
        table_.clear(i);
    }
    gpu::sync();
    lo_ = __builtin_inff();
    hi_ = -__builtin_inff();
    values_ = zeros_ = infinite_ = nan_ = 0;
    if constexpr (kCounts<Table>) window_ = core::window_of(layout_, state_.top[channel_]);
  }

  // All threads call this for each chunk. `padding` of the values are NaN that stand for no value.
  TE_GPU void add(const float (&x)[kValues], int padding) {
    uint32_t zeros = 0, infinite = 0, beyond = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const uint32_t abs = core::bits_of(x[i]) & core::kAbsBits;
      // fmin and fmax ignore NaN, so infinities do not reach the extrema.
      const float finite = abs < core::kInfBits ? x[i] : __builtin_nanf("");
      lo_ = __builtin_fminf(lo_, finite);
      hi_ = __builtin_fmaxf(hi_, finite);
      zeros += abs == 0 ? 1 : 0;
      infinite += abs == core::kInfBits ? 1 : 0;
      beyond += abs > core::kInfBits ? 1 : 0;
    }
    values_ += static_cast<uint32_t>(kValues - padding);
    zeros_ += zeros;
    infinite_ += infinite;
    nan_ += beyond - static_cast<uint32_t>(padding);
    if constexpr (kCounts<Table>) {
      const int32_t octave = core::top_octave(lo_, hi_);
      if (gpu::sync_or(octave > state_.top[channel_])) raise(octave);
      count(x);
    }
  }

  // Call after the last value. Then state.totals is that of all threads, and the counters are in
  // the table. `tiny` is the number of finite values that are not zero: who takes counters out of
  // the table subtracts their sum from it.
  TE_GPU void finish() {
    const int64_t finite = int64_t{values_} - infinite_ - nan_;
    const int64_t tiny = kCounts<Table> ? finite - zeros_ : 0;
    Partial own = {core::key_of(lo_), core::key_of(hi_), {finite, zeros_, tiny, infinite_, nan_}};
    for (int lanes = gpu::kWarp / 2; lanes >= channels_; lanes /= 2) {
      const int32_t min_key = gpu::shuffle_xor(own.min_key, lanes);
      const int32_t max_key = gpu::shuffle_xor(own.max_key, lanes);
      own.min_key = min_key < own.min_key ? min_key : own.min_key;
      own.max_key = max_key > own.max_key ? max_key : own.max_key;
      for (int64_t& n : own.tally) n += gpu::shuffle_xor(n, lanes);
    }
    if (gpu::thread() % gpu::kWarp < channels_) combine(state_.totals[channel_], own);
    gpu::sync();
  }

  // Adds `from` to `into` in shared memory with atomics, so other threads may do so at the same
  // time.
  TE_GPU static void combine(Partial& into, const Partial& from) {
    gpu::lower(&into.min_key, from.min_key);
    gpu::raise(&into.max_key, from.max_key);
    for (int column = 0; column < core::kTallyColumns; ++column)
      if (from.tally[column] != 0) gpu::add(&into.tally[column], from.tally[column]);
  }

 private:
  // Raises the windows to the octaves that any thread needs; clears the slots of the octaves that
  // leave.
  TE_GPU void raise(int32_t octave) {
    gpu::raise(&state_.next_top[channel_], octave);
    gpu::sync();
    for (int c = 0; c < channels_; ++c) {
      const int32_t top = state_.top[c], new_top = state_.next_top[c];
      if (top == 0 || new_top <= top) continue;
      const int32_t end = layout_.bottom(new_top) <= top ? layout_.bottom(new_top) : top + 1;
      for (int32_t old = layout_.bottom(top); old < end; ++old) clear_octave(c, old);
    }
    gpu::sync();
    if (gpu::thread() < channels_) state_.top[gpu::thread()] = state_.next_top[gpu::thread()];
    gpu::sync();
    window_ = core::window_of(layout_, state_.top[channel_]);
  }
  TE_GPU void clear_octave(int c, int32_t octave) {
    const int64_t width = int64_t{1} << layout_.mantissa_bits;
    const int64_t begin = c * layout_.size() + layout_.octave_begin(octave);
    for (int64_t k = gpu::thread(); k < 2 * width; k += kThreads)
      table_.clear(begin + (k < width ? k : k - width + layout_.bins()));
  }

  // A run of values in the same bin (values outside the window do not end it) is added with one
  // atomic: with constant data all threads would otherwise wait for one counter.
  TE_GPU void count(const float (&x)[kValues]) {
    const uint32_t offset = static_cast<uint32_t>(channel_ * layout_.size());
    uint32_t bin = 0, run = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const uint32_t bits = core::bits_of(x[i]);
      if (window_.relative(bits) >= window_.width) continue;
      const uint32_t next = window_.index(bits);
      if (next != bin) {
        if (run != 0) table_.add(offset + bin, run);
        bin = next;
        run = 0;
      }
      ++run;
    }
    if (run != 0) table_.add(offset + bin, run);
  }

  BlockState& state_;
  const Table table_;
  const core::HistogramLayout layout_;
  const int channels_;
  const int channel_;
  core::Window window_;
  float lo_, hi_;
  uint32_t values_, zeros_, infinite_, nan_;
};

}  // namespace torch_ext::cuda
