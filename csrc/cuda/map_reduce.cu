#include <algorithm>

#include "core/divide.h"
#include "core/parts.h"
#include "cuda/driver.h"
#include "cuda/group.h"
#include "gpu.h"
#include "registry.h"

// Derivatives of learned fake-quants. The tangent is element-wise. Backward: dx, and the sums over
// each channel, in one pass over memory.
// A warp or a thread sums each part; after a barrier of all blocks the sums of the parts are
// summed. All sums are in the order of core/learned.h.
namespace torch_ext::cuda {
namespace {

using core::kSumLanes;
using core::LearnedJob;

// Which sums are wanted, apart from dx.
enum class Kept { none, parameter, both };

constexpr int kSlots = kSumLanes / gpu::kWarp;
static_assert(kSlots == kGroup);

// A thread's eight lanes of the sums of a warp, as packets of kPacket consecutive lanes: slot k is
// lane lane_of(k).
template <int kPacket>
struct Slots {
  double of[kSlots] = {};

  TE_GPU static int lane_of(int slot) {
    return slot / kPacket * (gpu::kWarp * kPacket) + gpu::thread() % gpu::kWarp * kPacket +
           slot % kPacket;
  }
  // The sum of all lanes, in the first thread of the warp. All threads have to call it.
  TE_GPU double sum() {
#pragma unroll
    for (int half = kSlots / 2; half >= kPacket; half /= 2)
#pragma unroll
      for (int k = 0; k < half; ++k) of[k] += of[k + half];
#pragma unroll
    for (int k = 0; k < kPacket; ++k)
#pragma unroll
      for (int distance = gpu::kWarp / 2; distance > 0; distance /= 2)
        of[k] += gpu::shuffle_xor(of[k], distance);
#pragma unroll
    for (int half = kPacket / 2; half > 0; half /= 2)
#pragma unroll
      for (int k = 0; k < half; ++k) of[k] += of[k + half];
    return of[0];
  }
};

// `sums` and `others` hold, for the parameter and then for what is clipped, [channels, parts] and
// [channels, sums of the parts].
template <class F, class T, Kept kKept>
struct LearnedBackward {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / gpu::kWarp;
  using C = core::compute_t<T>;

  LearnedJob job;
  core::Parts parts;
  bool aligned;
  double* sums;
  double* others;

  TE_GPU void operator()() const {
    if (parts.rows)
      for (int64_t i = gpu::block() * kThreads + gpu::thread();
           i < parts.count * job.layout.channels; i += gpu::blocks() * kThreads)
        add_rows(i % job.layout.channels, i / job.layout.channels);
    else
      each_warp(parts.count * job.layout.channels, [&](int64_t i) { add_part(i); });
    if constexpr (kKept == Kept::none) return;
    gpu::sync_blocks();
    double *from = sums, *to = others;
    int64_t count = parts.count;
    while (count > 1) {
      const int64_t next = core::sums_of(count), rows = kColumns * job.layout.channels;
      each_warp(next * rows, [&](int64_t i) { fold(from, count, i / next, i % next, to + i); });
      gpu::sync_blocks();
      double* const swapped = from;
      from = to;
      to = swapped;
      count = next;
    }
    for (int64_t c = gpu::block() * kThreads + gpu::thread(); c < job.layout.channels;
         c += gpu::blocks() * kThreads)
      store_gradients(job, c, count == 0 ? 0 : from[c],
                      count == 0 || kColumns == 1 ? 0 : from[job.layout.channels + c]);
  }

 private:
  static constexpr int kColumns = kKept == Kept::both ? 2 : 1;

  TE_GPU static int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
  TE_GPU static bool is_first() { return gpu::thread() % gpu::kWarp == 0; }
  template <class Body>
  TE_GPU static void each_warp(int64_t items, const Body& body) {
    for (int64_t i = gpu::block() * kWarps + gpu::thread() / gpu::kWarp; i < items;
         i += gpu::blocks() * kWarps)
      body(i);
  }
  // A warp computes the s-th sum over a row of `count` values.
  TE_GPU static void fold(const double* from, int64_t count, int64_t row, int64_t s, double* to) {
    const int64_t length = smaller_of(count - s * core::kSumLength, core::kSumLength);
    const double* const values = from + row * count + s * core::kSumLength;
    Slots<1> own;
    for (int64_t at = 0; at < length; at += kSumLanes)
#pragma unroll
      for (int k = 0; k < kSlots; ++k)
        if (at + own.lane_of(k) < length) own.of[k] += values[at + own.lane_of(k)];
    const double total = own.sum();
    if (is_first()) *to = total;
  }

  // What backward needs to know of a channel.
  struct Channel {
    core::UnitGrid<C> grid;
    C effective;
  };
  TE_GPU Channel channel(int64_t c) const {
    return {F::template unit_grid<C>(job.parameter[c], core::zero_point_of(job, c), job.codes),
            static_cast<C>(F::effective(job.parameter[c]))};
  }
  // The gradient of an element of x; its terms are added to the sums.
  TE_GPU static T add(const Channel& channel, T x, T grad, double& parameter, double& clipped) {
    const core::Terms<C> terms =
        F::backward(core::widen(x), core::widen(grad), channel.grid, channel.effective);
    if constexpr (kKept != Kept::none) parameter += terms.parameter;
    if constexpr (kKept == Kept::both) clipped += terms.clipped;
    return core::narrow<T>(terms.dx);
  }
  TE_GPU void add_at(const Channel& channel, int64_t i, double& parameter, double& clipped) const {
    const T dx = add(channel, static_cast<const T*>(job.x)[i], static_cast<const T*>(job.grad)[i],
                     parameter, clipped);
    if (job.dx != nullptr) static_cast<T*>(job.dx)[i] = dx;
  }
  TE_GPU void keep(int64_t c, int64_t part, double parameter, double clipped) const {
    if constexpr (kKept == Kept::none) return;
    sums[c * parts.count + part] = parameter;
    if constexpr (kKept == Kept::both)
      sums[(job.layout.channels + c) * parts.count + part] = clipped;
  }

  // A thread sums a part of a few outer rows of a channel.
  TE_GPU void add_rows(int64_t c, int64_t part) const {
    const Channel own = channel(c);
    double parameter = 0, clipped = 0;
    const int64_t end = smaller_of((part + 1) * parts.per_part, job.layout.outer);
    for (int64_t o = part * parts.per_part; o < end; ++o) {
      const int64_t row = (o * job.layout.channels + c) * job.layout.inner;
      for (int64_t i = row; i < row + job.layout.inner; ++i) add_at(own, i, parameter, clipped);
    }
    keep(c, part, parameter, clipped);
  }

  // A warp sums a part of a row. Units are in memory order: [outer, channels, parts of a row].
  TE_GPU void add_part(int64_t unit) const {
    const int64_t row = unit / parts.per_row, part = unit % parts.per_row;
    const int64_t c = row % job.layout.channels, o = row / job.layout.channels;
    const int64_t begin = row * job.layout.inner + part * parts.per_part;
    const int64_t count = smaller_of(parts.per_part, job.layout.inner - part * parts.per_part);
    const int64_t index = o * parts.per_row + part;
    if (aligned && begin % kPerPacket<T> == 0 && count >= kSumLanes)
      add_run<kPerPacket<T>>(c, begin, count, index);
    else
      add_run<1>(c, begin, count, index);
  }
  // kPacket > 1: in accesses of 16 bytes.
  template <int kPacket>
  TE_GPU void add_run(int64_t c, int64_t begin, int64_t count, int64_t index) const {
    const Channel own = channel(c);
    Slots<kPacket> parameter, clipped;
    int64_t at = 0;
    if constexpr (kPacket > 1) {
      for (; at + kSumLanes <= count; at += kSumLanes) {
        constexpr int kPackets = kSlots / kPacket;
        gpu::Packet x[kPackets], grad[kPackets];
#pragma unroll
        for (int p = 0; p < kPackets; ++p) {
          const int64_t from = begin + at + parameter.lane_of(p * kPacket);
          x[p] = gpu::load(static_cast<const T*>(job.x) + from);
          grad[p] = gpu::load(static_cast<const T*>(job.grad) + from);
        }
#pragma unroll
        for (int p = 0; p < kPackets; ++p) {
          gpu::Packet dx{};
#pragma unroll
          for (int i = 0; i < kPacket; ++i) {
            const int k = p * kPacket + i;
            set_element(dx, i,
                        add(own, element<T>(x[p], i), element<T>(grad[p], i), parameter.of[k],
                            clipped.of[k]));
          }
          if (job.dx != nullptr)
            gpu::store(static_cast<T*>(job.dx) + begin + at + parameter.lane_of(p * kPacket), dx);
        }
      }
    }
    for (; at < count; at += kSumLanes)
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        const int64_t i = at + parameter.lane_of(k);
        if (i < count) add_at(own, begin + i, parameter.of[k], clipped.of[k]);
      }
    if constexpr (kKept == Kept::none) return;
    const double sum = parameter.sum();
    const double clipped_sum = kKept == Kept::both ? clipped.sum() : 0;
    if (is_first()) keep(c, index, sum, clipped_sum);
  }
};

// A thread has eight elements of few channels, as what a channel needs takes longer than they do:
// of as many outer rows where rows are short, else eight in a row.
template <class F, class T>
struct LearnedTangent {
  static constexpr int kThreads = 256;
  using C = core::compute_t<T>;

  core::TangentJob job;
  bool short_rows;

  static bool has_short_rows(const core::ChannelLayout& layout) {
    return layout.channels > 1 && layout.inner < core::kLongRow;
  }
  static int64_t threads_for(const core::ChannelLayout& layout) {
    if (has_short_rows(layout))
      return (layout.outer + kGroup - 1) / kGroup * layout.channels * layout.inner;
    return (layout.numel() + kGroup - 1) / kGroup;
  }

  TE_GPU void operator()() const {
    const int64_t inner = job.layout.inner, numel = job.layout.numel();
    const int64_t step = short_rows ? job.layout.channels * inner : 1;
    const int64_t unit = gpu::block() * kThreads + gpu::thread(),
                  group = core::quotient(unit, step);
    int64_t i = (group * kGroup) * step + unit - group * step;
    if (i >= numel) return;
    int64_t row = core::quotient(i, inner), left = (row + 1) * inner - i;
    ChannelTangent<F, C> channel(job, core::modulo(row, job.layout.channels));
    for (int k = 0; k < kGroup && i < numel; ++k, i += step) {
      if (!short_rows && left-- == 0) {
        channel = ChannelTangent<F, C>(job, core::modulo(++row, job.layout.channels));
        left = inner - 1;
      }
      const C x = core::widen(static_cast<const T*>(job.x)[i]);
      const C x_tangent =
          job.x_tangent == nullptr ? C{} : core::widen(static_cast<const T*>(job.x_tangent)[i]);
      static_cast<T*>(job.out)[i] = core::narrow<T>(channel.of(x, x_tangent));
    }
  }
};

core::Parts parts_for(const LearnedJob& job) {
  return job.layout.numel() == 0 ? core::Parts{false, 1, 1, 0} : core::parts_of(job.layout);
}

Kept kept_of(const LearnedJob& job) {
  if (job.d_parameter == nullptr) return Kept::none;
  return job.d_zero_point == nullptr && job.d_mixed == nullptr ? Kept::parameter : Kept::both;
}

template <class F, class T, Kept kKept>
void launch_backward(const LearnedJob& job, double* scratch, Stream stream) {
  using Kernel = LearnedBackward<F, T, kKept>;
  const core::Parts parts = parts_for(job);
  const int64_t units = parts.count * job.layout.channels;
  const bool aligned = is_aligned(job.x) && is_aligned(job.grad) && is_aligned(job.dx);
  const Kernel kernel{job, parts, aligned, scratch, scratch + 2 * units};
  const int64_t worth = parts.rows ? (units + Kernel::kThreads - 1) / Kernel::kThreads
                                   : (units + Kernel::kWarps - 1) / Kernel::kWarps;
  gpu::launch(F::name, kernel,
              {std::clamp<int64_t>(worth, 1, gpu::resident_blocks<Kernel>(0)), 0, true}, stream);
}

}  // namespace

size_t learned_backward_scratch(const LearnedJob& job) {
  const int64_t parts = parts_for(job).count;
  return 2 * job.layout.channels * (parts + core::sums_of(parts)) * sizeof(double);
}

void learned_backward(core::DType dtype, const LearnedJob& job, void* scratch, Stream stream) {
  if (job.layout.channels == 0) return;
  double* const sums = static_cast<double*>(scratch);
  with_type(dtype, [&]<class T>() {
    LearnedFakeQuants::for_each_on_host([&]<class F>(int32_t index) {
      if (index != job.method) return;
      const Kept kept = kept_of(job);
      if (kept == Kept::none) {
        launch_backward<F, T, Kept::none>(job, sums, stream);
      } else if (kept == Kept::parameter) {
        launch_backward<F, T, Kept::parameter>(job, sums, stream);
      } else if constexpr (F::per_channel) {  // only such methods have a zero point
        launch_backward<F, T, Kept::both>(job, sums, stream);
      }
    });
  });
}

void learned_tangent(core::DType dtype, const core::TangentJob& job, Stream stream) {
  if (job.layout.numel() == 0) return;
  with_type(dtype, [&]<class T>() {
    LearnedFakeQuants::for_each_on_host([&]<class F>(int32_t index) {
      if (index != job.method) return;
      using Kernel = LearnedTangent<F, T>;
      const int64_t threads = Kernel::threads_for(job.layout);
      gpu::launch(F::name, Kernel{job, Kernel::has_short_rows(job.layout)},
                  {(threads + Kernel::kThreads - 1) / Kernel::kThreads}, stream);
    });
  });
}

}  // namespace torch_ext::cuda
