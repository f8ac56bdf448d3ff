#include <algorithm>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "cpu/observe_channel.h"
#include "cpu/observe_extrema.h"
#include "cpu/observe_patterns.h"
#include "cpu/parallel.h"

namespace torch_ext::cpu {
namespace {

using core::Walk;

// Below kDirect values, a task counts straight into the statistic. A thread gets at least
// kPerThread values.
constexpr int64_t kDirect = 1 << 16;
constexpr int64_t kPerThread = 1 << 15;
// Values of a task from which on those of a 16-bit type are counted by their patterns. A float16
// has more patterns in an octave, so there are more to add to the histogram.
constexpr int64_t kManyBfloat16 = 1 << 16, kManyHalf = 1 << 18;
// Channels that a task reads together where they are adjacent in memory: one cache line of float32.
constexpr int64_t kTransposedChannels = 16;
// Row stride of the staging of transposed channels. No power of two, which would map all rows to
// the same cache sets.
constexpr int64_t kStagingStride = kGroup + 16;

// Values [begin, end) of `count` <= kTransposedChannels adjacent channels: read row by row and
// transposed into a staging buffer.
template <class T>
void observe_transposed(const Task& task, int64_t channel, int64_t count, int64_t begin,
                        int64_t end) {
  const AccumulateKernels& k = kernels().accumulate;
  std::vector<std::unique_ptr<Accumulator>> accumulators;
  for (int64_t c = 0; c < count; ++c)
    accumulators.push_back(std::make_unique<Accumulator>(
        k, task.into.layout, task.into.channel(channel + c), task.direct));
  std::vector<T> staging(count * kStagingStride);
  float group[kGroup];
  int64_t filled = 0;
  const auto flush = [&] {
    for (int64_t c = 0; c < count; ++c) {
      widen(k, staging.data() + c * kStagingStride, filled, group);
      accumulators[c]->add(group, filled);
    }
    filled = 0;
  };
  const T* base = task.channel<T>(channel);
  for_each_run(task.walk, begin, end, [&](int64_t offset, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const T* row = base + offset + i * task.walk.dims[0].stride;
      for (int64_t c = 0; c < count; ++c)
        staging[c * kStagingStride + filled] = row[c * task.channel_stride];
      if (++filled == kGroup) flush();
    }
  });
  flush();
  const auto lock = task.lock();
  for (auto& accumulator : accumulators) accumulator->finish();
}

// How the channels of a tensor are read.
enum class Reading { channel, transposed, adjacent, short_rows };

Reading reading_of(const Walk& walk, int64_t channel_stride, const Statistic& into) {
  const bool extrema_only = into.layout.octaves == 0;
  const bool one_value = walk.count == 1 && walk.dims[0].size == 1;
  if (into.channels == 1) return Reading::channel;
  if (channel_stride == 1 && (walk.dims[0].stride > 1 || one_value))
    return extrema_only ? Reading::adjacent : Reading::transposed;
  const bool short_rows = walk.dims[0].stride == 1 && walk.dims[0].size <= kLongestRow;
  return extrema_only && short_rows ? Reading::short_rows : Reading::channel;
}

template <class T>
void observe_one(const Task& task, int64_t channel, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(uint16_t)) {
    constexpr int64_t kMany = std::is_same_v<T, core::half> ? kManyHalf : kManyBfloat16;
    if (task.into.layout.octaves != 0 && end - begin >= kMany)
      return observe_patterns<T>(task, channel, begin, end);
  }
  observe_channel<T>(task, channel, begin, end);
}

template <class T>
void observe_as(const TensorView& x, int32_t ch_axis, const Statistic& into) {
  const Walk walk = core::walk_of(x, ch_axis);
  const int64_t values = walk.values();
  if (values == 0 || into.channels == 0) return;
  const int64_t channel_stride = ch_axis < 0 ? 0 : x.strides[ch_axis];
  const Reading reading = reading_of(walk, channel_stride, into);
  const int64_t threads = num_threads();
  int64_t channels_per_task = 1;
  if (reading == Reading::transposed) channels_per_task = kTransposedChannels;
  if (reading == Reading::adjacent) channels_per_task = kBlockChannels;
  if (reading == Reading::short_rows)
    channels_per_task = std::min(kBlockChannels, (into.channels + threads - 1) / threads);
  const int64_t blocks = (into.channels + channels_per_task - 1) / channels_per_task;
  // A task reads whole units of its channels.
  const int64_t unit = reading == Reading::short_rows ? walk.dims[0].size : 1;
  const int64_t units = values / unit;
  int64_t splits = 1;
  if (blocks < threads)
    splits = std::clamp<int64_t>(values * into.channels / kPerThread, 1, threads);
  splits = std::min(splits, units);
  std::mutex mutex;
  const Task task{x,
                  walk,
                  into,
                  channel_stride,
                  splits == 1 && values < kDirect,
                  splits == 1 ? nullptr : &mutex};
  const int64_t grain =
      std::max<int64_t>(1, kPerThread / std::max<int64_t>(1, values * channels_per_task));
  parallel_for(0, blocks * splits, splits > 1 ? 1 : grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t channel = i / splits * channels_per_task, part = i % splits;
      const int64_t begin = units / splits * part + std::min(part, units % splits);
      const int64_t end = begin + units / splits + (part < units % splits ? 1 : 0);
      const int64_t count = std::min(channels_per_task, into.channels - channel);
      switch (reading) {
        case Reading::channel:
          observe_one<T>(task, channel, begin, end);
          break;
        case Reading::transposed:
          observe_transposed<T>(task, channel, count, begin, end);
          break;
        case Reading::adjacent:
          observe_adjacent<T>(task, channel, count, begin, end);
          break;
        case Reading::short_rows:
          observe_short_rows<T>(task, channel, count, begin * unit, end * unit);
          break;
      }
    }
  });
}

}  // namespace

void observe(const TensorView& x, int32_t ch_axis, const Statistic& into) {
  switch (x.dtype) {
    case core::DType::f32:
      return observe_as<float>(x, ch_axis, into);
    case core::DType::f64:
      return observe_as<double>(x, ch_axis, into);
    case core::DType::f16:
      return observe_as<core::half>(x, ch_axis, into);
    case core::DType::bf16:
      return observe_as<core::bfloat16>(x, ch_axis, into);
  }
}

}  // namespace torch_ext::cpu
