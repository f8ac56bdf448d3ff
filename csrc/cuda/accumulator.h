#pragma once

#include <cstdint>

#include "core/histogram.h"
#include "cuda/tables.h"
#include "gpu.h"

// What one block accumulates: values of up to kMaxGroupChannels channels, each thread's all of the
// same one. Registers hold a thread's extrema and tally, shared memory the counters; the windows
// only rise, all threads together, between two chunks of values.
namespace torch_ext::cuda {

constexpr int kMaxGroupChannels = 32;

// One channel's share of a block.
struct Partial {
  int32_t min_key;
  int32_t max_key;
  int64_t tally[core::kTallyColumns];
};

// A block's shared memory, in front of its counters.
struct BlockState {
  int32_t top[kMaxGroupChannels];       // octave that the window of the counters ends at
  int32_t next_top[kMaxGroupChannels];  // and has to
  Partial totals[kMaxGroupChannels];
};

constexpr Partial kNothing = {0x7f800000, -0x7f800000 - 1, {}};  // keys of +inf and -inf

template <class Table>
constexpr bool kCounts = !std::is_same_v<Table, NoTable>;

// Work on chunks of kValues values a thread.
template <class Table, int kThreads, int kValues>
class Accumulator {
 public:
  TE_GPU Accumulator(BlockState& state, Table table, core::HistogramLayout layout, int channels)
      : state_(state),
        table_(table),
        layout_(layout),
        channels_(channels),
        channel_(gpu::thread() % channels) {}

  // Before the first value; window c starts at octave top(c).
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

  // All threads call it for each chunk; `padding` of the values are NaN and do not exist.
  TE_GPU void add(const float (&x)[kValues], int padding) {
    uint32_t zeros = 0, infinite = 0, beyond = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const uint32_t abs = core::bits_of(x[i]) & core::kAbsBits;
      // A minimum or maximum leaves NaN out.
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

  // After the last value: what all threads found lies in state.totals, and the counters in the
  // table. All that is finite, not zero and not counted is tiny: whoever takes counters out of the
  // table takes their sum away from `tiny`.
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

  // Adds a share to another one in shared memory, while others do so too.
  TE_GPU static void combine(Partial& into, const Partial& from) {
    gpu::lower(&into.min_key, from.min_key);
    gpu::raise(&into.max_key, from.max_key);
    for (int column = 0; column < core::kTallyColumns; ++column)
      if (from.tally[column] != 0) gpu::add(&into.tally[column], from.tally[column]);
  }

 private:
  // Moves the windows up to what any thread saw: slots of octaves that fall out are emptied.
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

  // Equal values that follow each other are added at once, zeros between them or not: constant data
  // would otherwise make all threads wait for one counter.
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
