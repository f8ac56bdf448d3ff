#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/observe_channel.h"

// Many values of a 16-bit type: how often each of the 65,536 patterns occurs is counted, without
// looking at the values, and then the patterns are added to the histogram.
namespace torch_ext::cpu {

constexpr int64_t kPatterns = 1 << 16;

// Adds the values of T whose patterns the tables count to a channel, and clears the tables.
template <class T>
class PatternSum {
 public:
  PatternSum(const AccumulateKernels& kernels, NarrowTables tables)
      : kernels_(kernels), tables_(tables) {
    for (int64_t slice = 0; slice < kSlices; ++slice)
      occupied_[slice] = kernels_.any(tables_.from(slice * kSlice), kSlice);
  }

  // `zeros` more values were zero.
  void add_to(const core::ChannelStatistic& into, core::HistogramLayout layout, int64_t zeros) {
    extend(into, layout, zeros);
    const core::Window window =
        core::window_of(layout, core::top_octave(into.extrema[0], into.extrema[1]));
    int64_t tally[core::kTallyColumns] = {zeros, zeros};
    for (int64_t first = 0; first < kPatterns; first += kSlice) {
      if (!occupied_[first / kSlice]) continue;
      int64_t counts[kSlice] = {};
      const int64_t total = kernels_.drain(tables_.from(first), kSlice, counts);
      T patterns[kSlice];
      float values[kSlice];
      for (int64_t i = 0; i < kSlice; ++i) patterns[i] = T{static_cast<uint16_t>(first + i)};
      widen(kernels_, patterns, kSlice, values);
      int64_t outside = 0;  // and zeros, infinity and NaN
      for (int64_t i = 0; i < kSlice; ++i) {
        const uint32_t bits = core::bits_of(values[i]);
        const bool inside = window.relative(bits) < window.width;
        if (inside)
          into.counts[window.index(bits)] += counts[i];
        else
          outside += counts[i];
      }
      tally[core::kFinite] += total - outside;
      if (outside == 0) continue;
      for (int64_t i = 0; i < kSlice; ++i)
        add_outside(core::bits_of(values[i]), counts[i], window, tally);
    }
    for (int column = 0; column < core::kTallyColumns; ++column)
      into.tally[column] += tally[column];
  }

 private:
  static constexpr int64_t kSlice = 1024, kSlices = kPatterns / kSlice;
  static constexpr int64_t kMagnitudes = kPatterns / 2;  // patterns of one sign
  static constexpr int64_t kMostFinite = std::is_same_v<T, core::half> ? 0x7bff : 0x7f7f;

  static void add_outside(uint32_t bits, int64_t count, core::Window window, int64_t* tally) {
    const uint32_t abs = bits & core::kAbsBits;
    if (abs >= core::kInfBits) {
      tally[abs == core::kInfBits ? core::kInf : core::kNan] += count;
    } else if (window.relative(bits) >= window.width) {
      tally[core::kFinite] += count;
      tally[abs == 0 ? core::kZeros : core::kTiny] += count;
    }
  }
  bool occurs(int64_t pattern) const {
    return (tables_.even[pattern] | tables_.odd[pattern]) != 0 || tables_.carry[pattern] != 0;
  }
  // The first, or the last, finite pattern of a sign that occurs, or -1.
  int64_t first(int64_t zero) const {
    for (int64_t begin = zero; begin < zero + kMagnitudes; begin += kSlice) {
      if (!occupied_[begin / kSlice]) continue;
      for (int64_t pattern = begin; pattern < begin + kSlice; ++pattern)
        if (occurs(pattern)) return pattern <= zero + kMostFinite ? pattern : -1;
    }
    return -1;
  }
  int64_t last(int64_t zero) const {
    for (int64_t begin = zero + kMagnitudes - kSlice; begin >= zero; begin -= kSlice) {
      if (!occupied_[begin / kSlice]) continue;
      for (int64_t pattern = begin + kSlice - 1; pattern >= begin; --pattern)
        if (pattern <= zero + kMostFinite && occurs(pattern)) return pattern;
    }
    return -1;
  }
  // Widens the extrema. Magnitudes grow with the patterns, from 0 and from kMagnitudes on.
  void extend(const core::ChannelStatistic& into, core::HistogramLayout layout, int64_t zeros) {
    int64_t least = last(kMagnitudes), most = last(0);
    if (most < 0 && zeros != 0) most = 0;
    if (least < 0 && most < 0) return;
    if (least < 0) least = zeros != 0 ? 0 : first(0);
    if (most < 0) most = first(kMagnitudes);
    const auto value = [](int64_t pattern) {
      return core::widen(T{static_cast<uint16_t>(pattern)});
    };
    core::extend(into, layout, value(least), value(most));
  }

  const AccumulateKernels& kernels_;
  const NarrowTables tables_;
  bool occupied_[kSlices];  // whether a pattern of the slice occurs
};

// Values [begin, end) of one channel.
template <class T>
void observe_patterns(const Task& task, int64_t channel, int64_t begin, int64_t end) {
  const AccumulateKernels& k = kernels().accumulate;
  const Counters counters(kPatterns);
  const NarrowTables tables = counters.tables();
  const T* base = task.channel<T>(channel);
  const int64_t stride = task.walk.dims[0].stride;
  int64_t zeros = 0;
  uint16_t group[kGroup + kIndexPadding];
  for_each_run(task.walk, begin, end, [&](int64_t offset, int64_t n) {
    const T* x = base + offset;
    for (int64_t i = 0; i < n; i += kGroup, x += kGroup * stride) {
      int64_t size = std::min<int64_t>(kGroup, n - i);
      const uint16_t* patterns = &x->bits;
      if (stride != 1) {
        for (int64_t j = 0; j < size; ++j) group[j] = x[j * stride].bits;
        patterns = group;
      }
      // Increments of one counter wait for each other, so zeros are taken out where they are many.
      if (k.count_zeros(patterns, size) > size / 8) {
        const int64_t kept = k.drop_zeros(patterns, size, group);
        zeros += size - kept;
        size = kept;
        patterns = group;
      }
      k.count(patterns, size, tables);
    }
  });
  const auto lock = task.lock();
  PatternSum<T>(k, tables).add_to(task.into.channel(channel), task.into.layout, zeros);
}

}  // namespace torch_ext::cpu
