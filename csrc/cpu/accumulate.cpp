#include "cpu/accumulate.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/driver.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace torch_ext::cpu {
namespace {

using core::HistogramLayout;

// Elements below which a task counts straight into the statistic, and the least worth a thread.
constexpr int64_t kDirect = 4096;
constexpr int64_t kPerThread = 1 << 15;
// Channels read together where they lie side by side in memory: one cache line of float32.
constexpr int64_t kTogether = 16;
// Row stride of their staging, off the power of two that would map all rows to one cache set.
constexpr int64_t kStagingStride = kGroup + 16;

// Counters and staging of one accumulator. Kept between calls: fresh memory would cost more page faults
// than a small tensor costs to observe. Counters are zero whenever a workspace is in the pool.
struct Workspace {
  explicit Workspace(int64_t size)
      : even(size + kSpill), odd(size + kSpill), carry(size + kSpill), index(kGroup) {}
  std::vector<uint8_t> even, odd;
  std::vector<uint32_t> carry, index;
};

class Pool {
 public:
  std::unique_ptr<Workspace> take(int64_t size) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (auto& slot : free_) {
        if (static_cast<int64_t>(slot->even.size()) != size + kSpill) continue;
        std::unique_ptr<Workspace> found = std::move(slot);
        slot = std::move(free_.back());
        free_.pop_back();
        return found;
      }
    }
    return std::make_unique<Workspace>(size);
  }
  void give(std::unique_ptr<Workspace> workspace) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (free_.size() < kKept) free_.push_back(std::move(workspace));
  }

 private:
  static constexpr size_t kKept = 64;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> free_;
};

Pool& pool() {
  static Pool instance;
  return instance;
}

// The statistic of the values one task sees of one channel. Values go either into narrow tables that
// finish() adds to the channel, or (few values, nobody else writing) straight into the channel.
class Accumulator {
 public:
  Accumulator(const AccumulateKernels& kernels, HistogramLayout layout, core::ChannelStatistic target,
              bool direct)
      : kernels_(kernels), layout_(layout), target_(target), direct_(direct) {
    if (layout_.octaves == 0) return;
    if (direct_) {
      set_top(core::top_octave(target.extrema[0], target.extrema[1]));
      workspace_ = pool().take(0);
    } else {
      workspace_ = pool().take(layout_.size());
    }
  }
  ~Accumulator() {
    if (workspace_) pool().give(std::move(workspace_));
  }
  Accumulator(const Accumulator&) = delete;
  Accumulator& operator=(const Accumulator&) = delete;

  void add(const float* x, int64_t n);
  void finish();

 private:
  NarrowTables tables() {
    return {workspace_->even.data(), workspace_->odd.data(), workspace_->carry.data()};
  }
  void add_finite_of(const float* x, int64_t n);
  void set_top(int32_t top);
  void raise(int32_t top);
  void increment(int64_t n);
  int64_t drain(int32_t octave, int64_t* counts);

  const AccumulateKernels& kernels_;
  const HistogramLayout layout_;
  const core::ChannelStatistic target_;
  const bool direct_;
  std::unique_ptr<Workspace> workspace_;
  Window window_{};
  int32_t top_ = 0;
  int32_t min_key_ = INT32_MAX, max_key_ = INT32_MIN;
  int64_t tally_[core::kTallyColumns] = {};
};

void Accumulator::set_top(int32_t top) {
  top_ = top;
  const int32_t bottom = layout_.bottom(top);
  const uint32_t octaves = top == 0 ? 0 : static_cast<uint32_t>(top - bottom + 1);
  const int32_t m = layout_.mantissa_bits;
  window_ = {static_cast<uint32_t>(bottom) << m, octaves << m,
             static_cast<uint32_t>(layout_.octave_begin(bottom)),
             static_cast<uint32_t>(layout_.bins()), core::kMantissa - m};
}

// Takes what the narrow tables hold of an octave, both signs, into counts or, where that is null, away;
// returns how many values that were.
int64_t Accumulator::drain(int32_t octave, int64_t* counts) {
  const int64_t width = int64_t{1} << layout_.mantissa_bits;
  const NarrowTables t = tables();
  int64_t total = 0;
  for (int sign = 0; sign < 2; ++sign) {
    const int64_t begin = sign * layout_.bins() + layout_.octave_begin(octave);
    for (int64_t k = begin; k < begin + width; ++k) {
      const int64_t value = int64_t{t.carry[k]} * 256 + t.even[k] + t.odd[k];
      total += value;
      if (counts != nullptr) counts[k] += value;
    }
    std::fill_n(t.even + begin, width, uint8_t{0});
    std::fill_n(t.odd + begin, width, uint8_t{0});
    std::fill_n(t.carry + begin, width, uint32_t{0});
  }
  return total;
}

void Accumulator::raise(int32_t top) {
  if (direct_) {
    tally_[core::kTiny] += core::raise_window(target_.counts, layout_, top_, top);
  } else if (top_ != 0) {
    const int32_t end = std::min(layout_.bottom(top), top_ + 1);
    for (int32_t octave = layout_.bottom(top_); octave < end; ++octave)
      tally_[core::kTiny] += drain(octave, nullptr);
  }
  set_top(top);
}

void Accumulator::increment(int64_t n) {
  const uint32_t* index = workspace_->index.data();
  if (!direct_) {
    kernels_.count(index, n, tables());
    return;
  }
  const uint32_t size = static_cast<uint32_t>(layout_.size());
  for (int64_t i = 0; i < n; ++i)
    if (index[i] < size) ++target_.counts[index[i]];
}

// n <= kGroup values.
void Accumulator::add(const float* x, int64_t n) {
  if (n == 0) return;
  const bool histogram = layout_.octaves != 0;
  uint32_t* index = histogram ? workspace_->index.data() : nullptr;
  GroupSummary s = histogram && top_ != 0 ? kernels_.classify(x, n, window_, index)
                                          : kernels_.summarize(x, n);
  if (s.min_key < core::kMinFiniteKey || s.max_key > core::kMaxFiniteKey) {
    add_finite_of(x, n);
    return;
  }
  min_key_ = std::min(min_key_, s.min_key);
  max_key_ = std::max(max_key_, s.max_key);
  tally_[core::kFinite] += n;
  tally_[core::kZeros] += s.zeros;
  if (!histogram) return;
  const int32_t top =
      core::top_octave(core::float_of_key(s.min_key), core::float_of_key(s.max_key));
  if (top > top_) {
    raise(top);
    s = kernels_.classify(x, n, window_, index);
  }
  tally_[core::kTiny] += n - s.zeros - s.in_window;
  if (s.in_window != 0) increment(n);
}

void Accumulator::add_finite_of(const float* x, int64_t n) {
  float finite[kGroup];
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t abs = core::bits_of(x[i]) & core::kAbsBits;
    finite[kept] = x[i];
    kept += abs < core::kInfBits ? 1 : 0;
    tally_[core::kInf] += abs == core::kInfBits ? 1 : 0;
    tally_[core::kNan] += abs > core::kInfBits ? 1 : 0;
  }
  add(finite, kept);
}

void Accumulator::finish() {
  if (tally_[core::kFinite] != 0) {
    const float min = core::float_of_key(min_key_), max = core::float_of_key(max_key_);
    if (direct_ && layout_.octaves != 0) {
      // The window of the target has moved along with the counting.
      const core::ChannelStatistic extrema_only = {target_.extrema, target_.tally, nullptr};
      core::extend(extrema_only, {layout_.mantissa_bits, 0}, min, max);
    } else {
      core::extend(target_, layout_, min, max);
    }
  }
  for (int column = 0; column < core::kTallyColumns; ++column)
    target_.tally[column] += tally_[column];
  if (layout_.octaves == 0 || direct_ || top_ == 0) return;
  const int32_t bottom =
      layout_.bottom(core::top_octave(target_.extrema[0], target_.extrema[1]));
  for (int32_t octave = layout_.bottom(top_); octave <= top_; ++octave) {
    const int64_t moved = drain(octave, octave < bottom ? nullptr : target_.counts);
    if (octave < bottom) target_.tally[core::kTiny] += moved;
  }
}

struct Dim {
  int64_t size;
  int64_t stride;
};

// The dimensions that one channel's values span, innermost in memory first, merged where they run on.
std::vector<Dim> value_dims(const TensorView& x, int32_t ch_axis) {
  std::vector<Dim> dims;
  for (int32_t d = 0; d < x.ndim; ++d)
    if (d != ch_axis && x.sizes[d] != 1) dims.push_back({x.sizes[d], x.strides[d]});
  // Expanded dimensions (stride 0) last, so that the rest stays one run.
  std::sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) {
    return (a.stride == 0 ? INT64_MAX : a.stride) < (b.stride == 0 ? INT64_MAX : b.stride);
  });
  std::vector<Dim> merged;
  for (const Dim& d : dims) {
    if (!merged.empty() && d.stride == merged.back().stride * merged.back().size)
      merged.back().size *= d.size;
    else
      merged.push_back(d);
  }
  if (merged.empty()) merged.push_back({1, 1});
  return merged;
}

// Walks value indices [begin, end) as runs along the innermost dimension: body(offset, n).
template <class Body>
void for_each_run(const std::vector<Dim>& dims, int64_t begin, int64_t end, const Body& body) {
  const int64_t inner = dims[0].size;
  while (begin < end) {
    int64_t rest = begin / inner, offset = (begin % inner) * dims[0].stride;
    const int64_t n = std::min(inner - begin % inner, end - begin);
    for (size_t d = 1; d < dims.size(); ++d) {
      offset += (rest % dims[d].size) * dims[d].stride;
      rest /= dims[d].size;
    }
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

// Feeds one channel's values to an accumulator in groups, without a copy where they lie in order.
template <class T>
class Feeder {
 public:
  Feeder(const AccumulateKernels& kernels, Accumulator& into) : kernels_(kernels), into_(into) {}

  void run(const T* x, int64_t n, int64_t stride) {
    while (n > 0) {
      const int64_t piece = std::min<int64_t>(n, kGroup - filled_);
      if constexpr (std::is_same_v<T, float>) {
        if (stride == 1 && filled_ == 0 && piece >= kGroup / 4) {
          into_.add(x, piece);
          x += piece;
          n -= piece;
          continue;
        }
      }
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
  const std::vector<Dim>& dims;
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
  for_each_run(task.dims, begin, end, [&](int64_t offset, int64_t n) {
    feeder.run(base + offset, n, task.dims[0].stride);
  });
  feeder.flush();
  finish(accumulator, task.mutex);
}

// Values [begin, end) of `count` <= kTogether channels that lie side by side: read once, transposed.
template <class T>
void observe_together(const Task& task, int64_t channel, int64_t count, int64_t begin, int64_t end) {
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
  for_each_run(task.dims, begin, end, [&](int64_t offset, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const T* row = base + offset + i * task.dims[0].stride;
      for (int64_t c = 0; c < count; ++c)
        staging[c * kStagingStride + filled] = row[c * task.channel_stride];
      if (++filled == kGroup) flush();
    }
  });
  flush();
  for (auto& accumulator : accumulators) finish(*accumulator, task.mutex);
}

template <class T>
void observe_as(const TensorView& x, int32_t ch_axis, const Statistic& into) {
  const std::vector<Dim> dims = value_dims(x, ch_axis);
  int64_t values = 1;
  for (const Dim& d : dims) values *= d.size;
  if (values == 0 || into.channels == 0) return;
  const int64_t channel_stride = ch_axis < 0 ? 0 : x.strides[ch_axis];
  const bool side_by_side = into.channels > 1 && channel_stride == 1 && dims[0].stride > 1;
  const int64_t together = side_by_side ? kTogether : 1;
  const int64_t blocks = (into.channels + together - 1) / together;
  const int64_t threads = num_threads();
  int64_t splits = 1;
  if (blocks < threads)
    splits = std::clamp<int64_t>(values * into.channels / kPerThread, 1, threads);
  splits = std::min(splits, values);
  std::mutex mutex;
  const Task task{x,
                  dims,
                  into,
                  channel_stride,
                  splits == 1 && values < kDirect,
                  splits == 1 ? nullptr : &mutex};
  const int64_t grain = std::max<int64_t>(1, kPerThread / std::max<int64_t>(1, values * together));
  parallel_for(0, blocks * splits, splits > 1 ? 1 : grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t channel = i / splits * together, part = i % splits;
      const int64_t begin = values / splits * part + std::min(part, values % splits);
      const int64_t end = begin + values / splits + (part < values % splits ? 1 : 0);
      if (side_by_side)
        observe_together<T>(task, channel, std::min(together, into.channels - channel), begin, end);
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
