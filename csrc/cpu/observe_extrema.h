#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/observe_channel.h"

// What a task of observe() does with many channels without a histogram: their extrema and zeros are
// found together, with no accumulator for each.
namespace torch_ext::cpu {

// Channels of a task: as many as have summaries that fit in the first-level cache.
constexpr int64_t kBlockChannels = 1024;
// Rows of a channel up to this length are read channel by channel, longer ones by an accumulator.
constexpr int64_t kLongestRow = 4096;

// Summaries of a block of channels.
class ExtremaBlock {
 public:
  explicit ExtremaBlock(int64_t count) : count_(count) {
    std::fill_n(min_key_, count + kChannelsAtOnce, INT32_MAX);
    std::fill_n(max_key_, count + kChannelsAtOnce, INT32_MIN);
    std::fill_n(zeros_, count + kChannelsAtOnce, 0);
    std::fill_n(all_zeros_, count, 0);
  }

  ChannelSummaries from(int64_t first) {
    return {min_key_ + first, max_key_ + first, zeros_ + first};
  }
  // How many of n values per channel may be added before this is called again: zeros are counted in
  // 32 bits, and carried to 64.
  int64_t room(int64_t n) {
    constexpr int64_t kMost = 1 << 30;
    if (pending_ == kMost || (n <= kMost && pending_ + n > kMost)) {
      for (int64_t c = 0; c < count_; ++c) all_zeros_[c] += std::exchange(zeros_[c], 0);
      pending_ = 0;
      carried_ = true;
    }
    const int64_t now = std::min(n, kMost - pending_);
    pending_ += now;
    return now;
  }
  // Takes channels [0, kept) as the first of several repetitions, and joins the others to them.
  void fold_to(int64_t kept) {
    for (int64_t c = kept; c < count_; ++c) {
      const int64_t to = c % kept;
      min_key_[to] = std::min(min_key_[to], min_key_[c]);
      max_key_[to] = std::max(max_key_[to], max_key_[c]);
      all_zeros_[to] += all_zeros_[c] + zeros_[c];
      carried_ = true;
    }
    count_ = kept;
  }
  bool finite(int64_t c) const { return GroupSummary{min_key_[c], max_key_[c], 0, 0}.finite(); }
  // Adds the finite channels, each of `values` values, to those from `first` on.
  void add_to(const AccumulateKernels& k, const Statistic& into, int64_t first, int64_t values) {
    for (int64_t c = 0; c < count_;) {
      const core::ChannelStatistic channel = into.channel(first + c);
      const int64_t done =
          k.extend_channels(from(c), count_ - c, values, channel.extrema, channel.tally);
      c += done;
      for (const int64_t end = std::min<int64_t>(count_, c + kChannelsAtOnce); c < end; ++c)
        if (finite(c)) extend(into.channel(first + c), c, values);
    }
    if (!carried_) return;
    for (int64_t c = 0; c < count_; ++c)
      if (finite(c)) into.channel(first + c).tally[core::kZeros] += all_zeros_[c];
  }

 private:
  void extend(core::ChannelStatistic into, int64_t c, int64_t values) const {
    core::extend(into, {0, 0}, core::float_of_key(min_key_[c]), core::float_of_key(max_key_[c]));
    into.tally[core::kFinite] += values;
    into.tally[core::kZeros] += zeros_[c];
  }

  static constexpr int64_t kRoom = kBlockChannels + kChannelsAtOnce;
  int64_t count_;
  int64_t pending_ = 0;
  bool carried_ = false;
  int32_t min_key_[kRoom], max_key_[kRoom], zeros_[kRoom];
  int64_t all_zeros_[kRoom];
};

// Calls body(x, row, rows, stride) for batches of rows of n <= kLongestRow values in float32: where
// they are, or a copy.
template <class T, class Body>
void for_each_batch(const AccumulateKernels& k, const T* x, int64_t rows, int64_t stride, int64_t n,
                    const Body& body) {
  if constexpr (std::is_same_v<T, float>) {
    body(x, int64_t{0}, rows, stride);
  } else {
    float wide[kLongestRow];
    const int64_t at_once = kLongestRow / n;
    for (int64_t row = 0; row < rows; row += at_once) {
      const int64_t count = std::min(at_once, rows - row);
      if (stride == n)
        widen(k, x + row * stride, count * n, wide);
      else
        for (int64_t r = 0; r < count; ++r) widen(k, x + (row + r) * stride, n, wide + r * n);
      body(wide, row, count, n);
    }
  }
}

// Adds a block to the statistic. A channel with a value that is not finite is read again.
template <class T>
void finish_block(const Task& task, ExtremaBlock& block, int64_t channel, int64_t count,
                  int64_t begin, int64_t end) {
  {
    const auto lock = task.lock();
    block.add_to(kernels().accumulate, task.into, channel, end - begin);
  }
  for (int64_t c = 0; c < count; ++c)
    if (!block.finite(c)) observe_channel<T>(task, channel + c, begin, end);
}

// Values [begin, end) of `count` channels that are adjacent in memory: read row by row.
template <class T>
void observe_adjacent(const Task& task, int64_t channel, int64_t count, int64_t begin,
                      int64_t end) {
  const AccumulateKernels& k = kernels().accumulate;
  const int64_t stride = task.walk.dims[0].stride;
  // Rows of few channels with no gap between them are read several at a time, as if each had
  // channels of its own. Joining these in the end has to be worth while.
  constexpr int64_t kManyValues = 1 << 17;
  const int64_t wide_row = (end - begin) * count < kManyValues ? 256 : kBlockChannels;
  const int64_t repeat = stride == count ? std::max<int64_t>(1, wide_row / count) : 1;
  const int64_t wide = repeat * count;
  ExtremaBlock block(wide);
  const auto read = [&](const T* x, int64_t rows, int64_t row_stride, int64_t n) {
    while (rows > 0) {
      const int64_t now = block.room(rows);
      for_each_batch(k, x, now, row_stride, n,
                     [&](const float* batch, int64_t, int64_t in_batch, int64_t batch_stride) {
                       k.summarize_rows(batch, in_batch, batch_stride, n, block.from(0));
                     });
      x += now * row_stride;
      rows -= now;
    }
  };
  const T* base = task.channel<T>(channel);
  for_each_run(task.walk, begin, end, [&](int64_t offset, int64_t n) {
    const int64_t together = n / repeat;
    read(base + offset, together, repeat * stride, wide);
    read(base + offset + together * repeat * stride, n % repeat, stride, count);
  });
  block.fold_to(count);
  finish_block<T>(task, block, channel, count, begin, end);
}

// Values [begin, end) of `count` channels whose rows, the runs along the innermost dimension, are
// contiguous and short; the ends lie between rows.
template <class T>
void observe_short_rows(const Task& task, int64_t channel, int64_t count, int64_t begin,
                        int64_t end) {
  const AccumulateKernels& k = kernels().accumulate;
  ExtremaBlock block(count);
  const T* base = task.channel<T>(channel);
  for_each_run(task.walk, begin, end, [&](int64_t offset, int64_t n) {
    block.room(n);
    for_each_batch(k, base + offset, count, task.channel_stride, n,
                   [&](const float* batch, int64_t first, int64_t rows, int64_t stride) {
                     k.summarize_channels(batch, stride, n, rows, block.from(first));
                   });
  });
  finish_block<T>(task, block, channel, count, begin, end);
}

}  // namespace torch_ext::cpu
