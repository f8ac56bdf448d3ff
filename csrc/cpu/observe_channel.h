#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <type_traits>

#include "core/walk.h"
#include "cpu/accumulator.h"
#include "cpu/driver.h"
#include "cpu/kernels.h"

// What a task of observe() does with the values of one channel.
namespace torch_ext::cpu {

struct Task {
  const TensorView& x;
  const core::Walk& walk;
  const Statistic& into;
  int64_t channel_stride;
  bool direct;
  std::mutex* mutex;  // not null where several tasks share a channel

  template <class T>
  const T* channel(int64_t c) const {
    return static_cast<const T*>(x.data) + c * channel_stride;
  }
  std::unique_lock<std::mutex> lock() const {
    return mutex == nullptr ? std::unique_lock<std::mutex>() : std::unique_lock<std::mutex>(*mutex);
  }
};

// Splits value indices [begin, end) into runs along the innermost dimension and calls body(offset,
// n) for each.
template <class Body>
void for_each_run(const core::Walk& walk, int64_t begin, int64_t end, const Body& body) {
  const int64_t inner = walk.dims[0].size;
  while (begin < end) {
    const int64_t n = std::min(inner - begin % inner, end - begin);
    const int64_t offset = walk.offset(begin);
    body(offset, n);
    begin += n;
  }
}

inline void widen(const AccumulateKernels&, const float* x, int64_t n, float* out) {
  std::copy_n(x, n, out);
}
inline void widen(const AccumulateKernels& k, const double* x, int64_t n, float* out) {
  k.widen_f64(x, n, out);
}
inline void widen(const AccumulateKernels& k, const core::half* x, int64_t n, float* out) {
  k.widen_f16(x, n, out);
}
inline void widen(const AccumulateKernels& k, const core::bfloat16* x, int64_t n, float* out) {
  k.widen_bf16(x, n, out);
}

inline GroupSummary summarize(const AccumulateKernels& k, const core::half* x, int64_t n) {
  return k.summarize_f16(x, n);
}
inline GroupSummary summarize(const AccumulateKernels& k, const core::bfloat16* x, int64_t n) {
  return k.summarize_bf16(x, n);
}

// Passes one channel's values to an accumulator in groups. Contiguous float32 values are not
// copied, nor are those of 16-bit types where only extrema are kept.
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
      if constexpr (sizeof(T) == 2) {
        if (stride == 1 && filled_ == 0 && into_.extrema_only()) {
          const GroupSummary s = summarize(kernels_, x, piece);
          if (s.finite()) {
            into_.add(s, piece);
            x += piece;
            n -= piece;
            continue;
          }
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

// Values [begin, end) of one channel.
template <class T>
void observe_channel(const Task& task, int64_t channel, int64_t begin, int64_t end) {
  const AccumulateKernels& k = kernels().accumulate;
  Accumulator accumulator(k, task.into.layout, task.into.channel(channel), task.direct);
  Feeder<T> feeder(k, accumulator);
  const T* base = task.channel<T>(channel);
  for_each_run(task.walk, begin, end, [&](int64_t offset, int64_t n) {
    feeder.run(base + offset, n, task.walk.dims[0].stride);
  });
  feeder.flush();
  const auto lock = task.lock();
  accumulator.finish();
}

}  // namespace torch_ext::cpu
