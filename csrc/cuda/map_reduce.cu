#include <algorithm>

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
static_assert(kSumLanes == gpu::kWarp);

struct Sums {
  double parameter;
  double zero_point;
};

template <class F, class T>
struct LearnedBackward {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / gpu::kWarp;
  using C = core::compute_t<T>;

  LearnedJob job;
  core::Parts parts;
  Sums* sums;    // [channels, parts]
  Sums* others;  // [channels, sums of the parts]

  TE_GPU void operator()() const {
    if (parts.rows)
      for (int64_t i = gpu::block() * kThreads + gpu::thread();
           i < parts.count * job.layout.channels; i += gpu::blocks() * kThreads)
        add_rows(i % job.layout.channels, i / job.layout.channels);
    else
      each_warp(parts.count * job.layout.channels, [&](int64_t i) { add_run(i); });
    gpu::sync_blocks();
    Sums *from = sums, *to = others;
    int64_t count = parts.count;
    while (count > 1) {
      const int64_t next = core::sums_of(count);
      each_warp(next * job.layout.channels,
                [&](int64_t i) { fold(from, count, i / next, i % next, to + i); });
      gpu::sync_blocks();
      Sums* const swapped = from;
      from = to;
      to = swapped;
      count = next;
    }
    for (int64_t c = gpu::block() * kThreads + gpu::thread(); c < job.layout.channels;
         c += gpu::blocks() * kThreads) {
      const Sums total = count == 0 ? Sums{0, 0} : from[c];
      store_gradients(job, c, total.parameter, total.zero_point);
    }
  }

 private:
  TE_GPU static int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
  TE_GPU static int lane() { return gpu::thread() % gpu::kWarp; }
  template <class Body>
  TE_GPU static void each_warp(int64_t items, const Body& body) {
    for (int64_t i = gpu::block() * kWarps + gpu::thread() / gpu::kWarp; i < items;
         i += gpu::blocks() * kWarps)
      body(i);
  }
  // Adds the sums of the lanes in pairs, and stores the total.
  TE_GPU static void store(Sums* to, Sums own) {
    for (int distance = kSumLanes / 2; distance > 0; distance /= 2) {
      own.parameter += gpu::shuffle_xor(own.parameter, distance);
      own.zero_point += gpu::shuffle_xor(own.zero_point, distance);
    }
    if (lane() == 0) *to = own;
  }
  // A warp computes the s-th sum over a channel's `count` values.
  TE_GPU static void fold(const Sums* from, int64_t count, int64_t c, int64_t s, Sums* to) {
    const int64_t length = smaller_of(count - s * core::kSumLength, core::kSumLength);
    const Sums* const values = from + c * count + s * core::kSumLength;
    Sums own{0, 0};
    for (int64_t k = lane(); k < length; k += kSumLanes) {
      own.parameter += values[k].parameter;
      own.zero_point += values[k].zero_point;
    }
    store(to, own);
  }

  // What backward needs to know of a channel.
  struct Channel {
    core::UnitGrid<C> grid;
    C effective;
    double inverse;
  };
  TE_GPU Channel channel(int64_t c) const {
    const core::UnitGrid<C> grid =
        F::template unit_grid<C>(job.parameter[c], core::zero_point_of(job, c), job.codes);
    return {grid, static_cast<C>(F::effective(job.parameter[c])),
            1.0 / static_cast<double>(grid.scale)};
  }
  TE_GPU void add(const Channel& channel, int64_t i, Sums& to) const {
    const core::Terms<C> terms = F::backward(core::widen(static_cast<const T*>(job.x)[i]),
                                             core::widen(static_cast<const T*>(job.grad)[i]),
                                             channel.grid, channel.effective, channel.inverse);
    static_cast<T*>(job.dx)[i] = core::narrow<T>(terms.dx);
    to.parameter += terms.parameter;
    to.zero_point += terms.zero_point;
  }

  // A thread sums a part of a few outer rows of a channel.
  TE_GPU void add_rows(int64_t c, int64_t part) const {
    const Channel own = channel(c);
    Sums sum{0, 0};
    const int64_t end = smaller_of((part + 1) * parts.per_part, job.layout.outer);
    for (int64_t o = part * parts.per_part; o < end; ++o) {
      const int64_t row = (o * job.layout.channels + c) * job.layout.inner;
      for (int64_t i = row; i < row + job.layout.inner; ++i) add(own, i, sum);
    }
    sums[c * parts.count + part] = sum;
  }

  // A warp sums a part of a row. Units are in memory order: [outer, channels, parts of a row].
  TE_GPU void add_run(int64_t unit) const {
    const int64_t row = unit / parts.per_row, part = unit % parts.per_row;
    const int64_t c = row % job.layout.channels, o = row / job.layout.channels;
    const Channel own = channel(c);
    const int64_t begin = row * job.layout.inner + part * parts.per_part;
    const int64_t count = smaller_of(parts.per_part, job.layout.inner - part * parts.per_part);
    Sums sum{0, 0};
#pragma unroll 4
    for (int64_t i = lane(); i < count; i += kSumLanes) add(own, begin + i, sum);
    store(sums + c * parts.count + o * parts.per_row + part, sum);
  }
};

template <class F, class T>
struct LearnedTangent {
  static constexpr int kThreads = 256;
  using C = core::compute_t<T>;

  core::TangentJob job;

  TE_GPU void operator()() const {
    const int64_t i = gpu::block() * kThreads + gpu::thread();
    if (i >= job.layout.numel()) return;
    const int64_t c = i / job.layout.inner % job.layout.channels;
    const C x = core::widen(static_cast<const T*>(job.x)[i]);
    const C x_tangent =
        job.x_tangent == nullptr ? C{} : core::widen(static_cast<const T*>(job.x_tangent)[i]);
    static_cast<T*>(job.out)[i] = core::narrow<T>(ChannelTangent<F, C>(job, c).of(x, x_tangent));
  }
};

core::Parts parts_for(const LearnedJob& job) {
  return job.layout.numel() == 0 ? core::Parts{false, 1, 1, 0} : core::parts_of(job.layout);
}

}  // namespace

size_t learned_backward_scratch(const LearnedJob& job) {
  const int64_t parts = parts_for(job).count;
  return job.layout.channels * (parts + core::sums_of(parts)) * sizeof(Sums);
}

void learned_backward(core::DType dtype, const LearnedJob& job, void* scratch, Stream stream) {
  if (job.layout.channels == 0) return;
  const core::Parts parts = parts_for(job);
  Sums* const sums = static_cast<Sums*>(scratch);
  with_type(dtype, [&]<class T>() {
    LearnedFakeQuants::for_each_on_host([&]<class F>(int32_t index) {
      if (index != job.method) return;
      using Kernel = LearnedBackward<F, T>;
      const Kernel kernel{job, parts, sums, sums + job.layout.channels * parts.count};
      const int64_t units = parts.count * job.layout.channels;
      const int64_t worth = parts.rows ? (units + Kernel::kThreads - 1) / Kernel::kThreads
                                       : (units + Kernel::kWarps - 1) / Kernel::kWarps;
      gpu::launch(F::name, kernel,
                  {std::clamp<int64_t>(worth, 1, gpu::resident_blocks<Kernel>(0)), 0, true},
                  stream);
    });
  });
}

void learned_tangent(core::DType dtype, const core::TangentJob& job, Stream stream) {
  with_type(dtype, [&]<class T>() {
    LearnedFakeQuants::for_each_on_host([&]<class F>(int32_t index) {
      if (index != job.method) return;
      using Kernel = LearnedTangent<F, T>;
      const int64_t blocks = (job.layout.numel() + Kernel::kThreads - 1) / Kernel::kThreads;
      gpu::launch(F::name, Kernel{job}, {blocks}, stream);
    });
  });
}

}  // namespace torch_ext::cuda
