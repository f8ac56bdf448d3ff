#include "cpu/accumulator.h"

#include <algorithm>
#include <mutex>
#include <vector>

namespace torch_ext::cpu {

struct Counters::Memory {
  explicit Memory(int64_t size) : even(size), odd(size), carried(size / kDrained), carry(size) {}
  std::vector<uint8_t> even, odd, carried;
  std::vector<uint32_t> carry;
};

// Kept between calls, because the page faults of fresh memory take longer than observing a small
// tensor.
class Counters::Pool {
 public:
  static Pool& instance() {
    static Pool pool;
    return pool;
  }
  std::unique_ptr<Memory> take(int64_t size) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (auto& slot : free_) {
        if (static_cast<int64_t>(slot->even.size()) != size) continue;
        std::unique_ptr<Memory> memory = std::move(slot);
        slot = std::move(free_.back());
        free_.pop_back();
        return memory;
      }
    }
    return std::make_unique<Memory>(size);
  }
  void give(std::unique_ptr<Memory> memory) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (free_.size() < kKept) free_.push_back(std::move(memory));
  }
  void hold() { mutex_.lock(); }
  void release() { mutex_.unlock(); }

 private:
  static constexpr size_t kKept = 64;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Memory>> free_;
};

Counters::Counters(int64_t size) : memory_(Pool::instance().take(size)) {}
Counters::~Counters() { Pool::instance().give(std::move(memory_)); }

void Counters::hold_pool() { Pool::instance().hold(); }
void Counters::release_pool() { Pool::instance().release(); }

NarrowTables Counters::tables() const {
  return {memory_->even.data(), memory_->odd.data(), memory_->carry.data(),
          memory_->carried.data()};
}

Accumulator::Accumulator(const AccumulateKernels& kernels, core::HistogramLayout layout,
                         core::ChannelStatistic target, bool direct)
    : kernels_(kernels), layout_(layout), target_(target), direct_(direct) {
  if (layout_.octaves == 0) return;
  if (direct_)
    set_top(core::top_octave(target.extrema[0], target.extrema[1]));
  else
    counters_.emplace(layout_.size());
}

void Accumulator::set_top(int32_t top) {
  top_ = top;
  window_ = core::window_of(layout_, top);
}

// Clears an octave's bins of both signs in the narrow tables and returns how many values they held.
// Adds these to `counts` unless it is null.
int64_t Accumulator::drain(int32_t octave, int64_t* counts) {
  const int64_t width = int64_t{1} << layout_.mantissa_bits;
  const NarrowTables t = counters_->tables();
  int64_t total = 0;
  for (int sign = 0; sign < 2; ++sign) {
    const int64_t begin = sign * layout_.bins() + layout_.octave_begin(octave);
    total += kernels_.drain(t.from(begin), width, counts == nullptr ? nullptr : counts + begin);
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

void Accumulator::add(const float* x, int64_t n) {
  if (n == 0) return;
  const bool histogram = layout_.octaves != 0;
  GroupSummary s =
      histogram && top_ != 0 ? kernels_.classify(x, n, window_, index_) : kernels_.summarize(x, n);
  if (!s.finite()) {
    for (int64_t i = 0; i < n; i += kGroup) add_finite_of(x + i, std::min<int64_t>(kGroup, n - i));
    return;
  }
  add(s, n);
  if (!histogram) return;
  const int32_t top =
      core::top_octave(core::float_of_key(s.min_key), core::float_of_key(s.max_key));
  if (top > top_) {
    raise(top);
    s = kernels_.classify(x, n, window_, index_);
  }
  tally_[core::kTiny] += n - s.zeros - s.in_window;
  if (direct_)
    kernels_.count_wide(index_, s.in_window, target_.counts);
  else
    kernels_.count(index_, s.in_window, counters_->tables());
}

void Accumulator::add(const GroupSummary& s, int64_t n) {
  min_key_ = std::min(min_key_, s.min_key);
  max_key_ = std::max(max_key_, s.max_key);
  tally_[core::kFinite] += n;
  tally_[core::kZeros] += s.zeros;
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
      // raise() has moved the target's window already.
      const core::ChannelStatistic extrema_only = {target_.extrema, target_.tally, nullptr};
      core::extend(extrema_only, {layout_.mantissa_bits, 0}, min, max);
    } else {
      core::extend(target_, layout_, min, max);
    }
  }
  for (int column = 0; column < core::kTallyColumns; ++column)
    target_.tally[column] += tally_[column];
  if (layout_.octaves == 0 || direct_ || top_ == 0) return;
  const int32_t bottom = layout_.bottom(core::top_octave(target_.extrema[0], target_.extrema[1]));
  for (int32_t octave = layout_.bottom(top_); octave <= top_; ++octave) {
    const int64_t moved = drain(octave, octave < bottom ? nullptr : target_.counts);
    if (octave < bottom) target_.tally[core::kTiny] += moved;
  }
}

}  // namespace torch_ext::cpu
