#include <algorithm>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/walk.h"
#include "cpu/accumulator.h"
#include "cpu/driver.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace torch_ext::cpu {
namespace {

using core::Walk;

// Below kDirect values, a task counts straight into the statistic. A thread gets at least
// kPerThread values.
constexpr int64_t kDirect = 4096;
constexpr int64_t kPerThread = 1 << 15;
// Channels that a task reads together where they are adjacent in memory: one cache line of float32.
constexpr int64_t kTransposedChannels = 16;
// The same where only extrema are kept: as many channels as have summaries that fit in the
// first-level cache.
constexpr int64_t kRowChannels = 1024;
// Row stride of the staging of transposed channels. No power of two, which would map all rows to
// the same cache sets.
constexpr int64_t kStagingStride = kGroup + 16;

// Splits value indices [begin, end) into runs along the innermost dimension and calls body(offset,
// n) for each.
template <class Body>
void for_each_run(const Walk& walk, int64_t begin, int64_t end, const Body& body) {
  const int64_t inner = walk.dims[0].size;
  while (begin < end) {
    const int64_t n = std::min(inner - begin % inner, end - begin);
    const int64_t offset = walk.offset(begin);
    body(offset, n);
    begin += n;
  }
}

void widen(const AccumulateKernels&, const float* x, int64_t n, float* out) {
  std::copy_n(x, n, out);
}
void widen(const AccumulateKernels& k, const double* x, int64_t n, float* out) {
  k.widen_f64(x, n, out);
}
void widen(const AccumulateKernels& k, const core::half* x, int64_t n, float* out) {
  k.widen_f16(x, n, out);
}
void widen(const AccumulateKernels& k, const core::bfloat16* x, int64_t n, float* out) {
  k.widen_bf16(x, n, out);
}

// Passes one channel's values to an accumulator in groups; contiguous float32 values are not
// copied.
template <class T>
class Feeder {
 public:
  Feeder(const AccumulateKernels& kernels, Accumulator& into) : kernels_(kernels), into_(into) {}

  void run(const T* x, int64_t n, int64_t stride) {
    while (n > 0) {
      if constexpr (std::is_same_v<T, float>) {
        const int64_t whole = std::min(n, into_.group());
        if (stride == 1 && filled_ == 0 && whole >= kGroup / 4) {
          into_.add(x, whole);
          x += whole;
          n -= whole;
          continue;
        }
      }
      const int64_t piece = std::min<int64_t>(n, kGroup - filled_);
      if (stride == 1) {
        widen(kernels_, x, piece, staging_ + filled_);
      } else {
        T gathered[kGroup];
        for (int64_t i = 0; i < piece; ++i) gathered[i] = x[i * stride];
        widen(kernels_, gathered, piece, staging_ + filled_);
      }
      filled_ += piece;
      if (filled_ == kGroup) flush();
      x += piece * stride;
      n -= piece;
    }
  }
  void flush() {
    into_.add(staging_, filled_);
    filled_ = 0;
  }

 private:
  const AccumulateKernels& kernels_;
  Accumulator& into_;
  int64_t filled_ = 0;
  float staging_[kGroup];
};

struct Task {
  const TensorView& x;
  const Walk& walk;
  const Statistic& into;
  int64_t channel_stride;
  bool direct;
  std::mutex* mutex;  // not null where several tasks share a channel
};

void finish(Accumulator& accumulator, std::mutex* mutex) {
  std::unique_lock<std::mutex> lock;
  if (mutex != nullptr) lock = std::unique_lock<std::mutex>(*mutex);
  accumulator.finish();
}

// Values [begin, end) of one channel.
template <class T>
void observe_channel(const Task& task, int64_t channel, int64_t begin, int64_t end) {
  const AccumulateKernels& k = kernels().accumulate;
  Accumulator accumulator(k, task.into.layout, task.into.channel(channel), task.direct);
  Feeder<T> feeder(k, accumulator);
  const T* base = static_cast<const T*>(task.x.data) + channel * task.channel_stride;
  for_each_run(task.walk, begin, end, [&](int64_t offset, int64_t n) {
    feeder.run(base + offset, n, task.walk.dims[0].stride);
  });
  feeder.flush();
  finish(accumulator, task.mutex);
}

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
  const T* base = static_cast<const T*>(task.x.data) + channel * task.channel_stride;
  for_each_run(task.walk, begin, end, [&](int64_t offset, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const T* row = base + offset + i * task.walk.dims[0].stride;
      for (int64_t c = 0; c < count; ++c)
        staging[c * kStagingStride + filled] = row[c * task.channel_stride];
      if (++filled == kGroup) flush();
    }
  });
  flush();
  for (auto& accumulator : accumulators) finish(*accumulator, task.mutex);
}

// The same without a histogram: extrema and zeros of `count` <= kRowChannels channels are updated a
// row at a time, without transposing. A channel with a value that is not finite is read again, by
// observe_channel().
template <class T>
void observe_rows(const Task& task, int64_t channel, int64_t count, int64_t begin, int64_t end) {
  const AccumulateKernels& k = kernels().accumulate;
  int32_t min_key[kRowChannels], max_key[kRowChannels], zeros[kRowChannels];
  int64_t all_zeros[kRowChannels] = {};
  std::fill_n(min_key, count, INT32_MAX);
  std::fill_n(max_key, count, INT32_MIN);
  std::fill_n(zeros, count, 0);
  float wide[kRowChannels];
  int64_t rows = 0;
  const auto carry = [&] {
    for (int64_t c = 0; c < count; ++c) all_zeros[c] += std::exchange(zeros[c], 0);
    rows = 0;
  };
  const T* base = static_cast<const T*>(task.x.data) + channel;
  for_each_run(task.walk, begin, end, [&](int64_t offset, int64_t n) {
    const int64_t stride = task.walk.dims[0].stride;
    constexpr int64_t kRowsPerCarry = 1 << 30;
    for (int64_t i = 0; i < n;) {
      const int64_t rows_now = std::min(n - i, kRowsPerCarry - rows);
      const T* from = base + offset + i * stride;
      if constexpr (std::is_same_v<T, float>) {
        k.summarize_rows(from, rows_now, stride, count, min_key, max_key, zeros);
      } else {
        for (int64_t r = 0; r < rows_now; ++r) {
          widen(k, from + r * stride, count, wide);
          k.summarize_rows(wide, 1, 0, count, min_key, max_key, zeros);
        }
      }
      i += rows_now;
      rows += rows_now;
      if (rows == kRowsPerCarry) carry();
    }
  });
  carry();
  for (int64_t c = 0; c < count; ++c) {
    if (!GroupSummary{min_key[c], max_key[c], 0, 0}.finite()) {
      observe_channel<T>(task, channel + c, begin, end);
      continue;
    }
    Accumulator accumulator(k, task.into.layout, task.into.channel(channel + c), task.direct);
    accumulator.add_summary(min_key[c], max_key[c], all_zeros[c], end - begin);
    finish(accumulator, task.mutex);
  }
}

template <class T>
void observe_as(const TensorView& x, int32_t ch_axis, const Statistic& into) {
  const Walk walk = core::walk_of(x, ch_axis);
  const int64_t values = walk.values();
  if (values == 0 || into.channels == 0) return;
  const int64_t channel_stride = ch_axis < 0 ? 0 : x.strides[ch_axis];
  const bool side_by_side = into.channels > 1 && channel_stride == 1 && walk.dims[0].stride > 1;
  const bool in_rows = side_by_side && into.layout.octaves == 0;
  const int64_t channels_per_task =
      in_rows ? kRowChannels : (side_by_side ? kTransposedChannels : 1);
  const int64_t blocks = (into.channels + channels_per_task - 1) / channels_per_task;
  const int64_t threads = num_threads();
  int64_t splits = 1;
  if (blocks < threads)
    splits = std::clamp<int64_t>(values * into.channels / kPerThread, 1, threads);
  splits = std::min(splits, values);
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
      const int64_t begin = values / splits * part + std::min(part, values % splits);
      const int64_t end = begin + values / splits + (part < values % splits ? 1 : 0);
      const int64_t count = std::min(channels_per_task, into.channels - channel);
      if (in_rows)
        observe_rows<T>(task, channel, count, begin, end);
      else if (side_by_side)
        observe_transposed<T>(task, channel, count, begin, end);
      else
        observe_channel<T>(task, channel, begin, end);
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
