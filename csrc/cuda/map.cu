#include "core/divide.h"
#include "cuda/driver.h"
#include "cuda/group.h"
#include "gpu.h"
#include "registry.h"

// Element-wise fake-quant. A thread processes eight elements, those of one byte of the mask.
namespace torch_ext::cuda {
namespace {

using core::FakeQuantJob;

struct NotLearned {};

// Iterates over the grids of consecutive elements of [outer, channels, inner]. Method: whose
// parameter is in job.scale. It is a parameter of the kernel because Pact's float64 code would take
// registers of every kernel.
template <class C, class Method>
class Channels {
 public:
  TE_GPU Channels(const FakeQuantJob& job, int64_t first) : job_(job) {
    if (job.layout.channels == 1) {
      left_ = INT64_MAX;
    } else {
      const int64_t row = core::quotient(first, job.layout.inner);
      left_ = job.layout.inner - (first - row * job.layout.inner);
      channel_ = core::modulo(row, job.layout.channels);
    }
    load();
  }
  TE_GPU const core::UnitGrid<C>& grid() const { return grid_; }
  TE_GPU void advance() {
    if (--left_ > 0) return;
    left_ = job_.layout.inner;
    channel_ = channel_ + 1 == job_.layout.channels ? 0 : channel_ + 1;
    load();
  }

 private:
  TE_GPU void load() {
    const float own = job_.scale[channel_];
    const int32_t zero_point = core::zero_point_of(job_, channel_);
    if constexpr (std::is_same_v<Method, NotLearned>)
      grid_ = core::make_unit_grid<C>(own, zero_point, job_.codes, job_.rounding);
    else
      grid_ = Method::template unit_grid<C>(own, zero_point, job_.codes);
  }
  const FakeQuantJob& job_;
  int64_t left_;
  int64_t channel_ = 0;
  core::UnitGrid<C> grid_;
};

template <class T, bool kDefault, class Method>
struct Forward {
  static constexpr int kThreads = 256;
  using C = core::compute_t<T>;

  FakeQuantJob job;
  bool aligned;

  TE_GPU void operator()() const {
    const int64_t numel = job.layout.numel();
    const int64_t first = (gpu::block() * kThreads + gpu::thread()) * kGroup;
    if (first >= numel) return;
    const T* const x = static_cast<const T*>(job.x) + first;
    T* const out = static_cast<T*>(job.out) + first;
    Channels<C, Method> channels(job, first);
    uint32_t bits = 0;
    if (aligned && numel - first >= kGroup) {
      Group<T> in, result{};
      in.load(x);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        result.set(i, map_element<T, kDefault>(job, in.get(i), channels.grid(), i, bits));
        if (i + 1 < kGroup) channels.advance();
      }
      result.store(out);
    } else {
      const int count = numel - first < kGroup ? static_cast<int>(numel - first) : kGroup;
      for (int i = 0; i < count; ++i) {
        out[i] = map_element<T, kDefault>(job, x[i], channels.grid(), i, bits);
        if (i + 1 < count) channels.advance();
      }
    }
    if (job.mask != nullptr) job.mask[first / kGroup] = static_cast<uint8_t>(bits);
  }
};

template <class T>
struct Backward {
  static constexpr int kThreads = 256;

  const T* grad;
  const uint8_t* mask;
  T* dx;
  int64_t numel;
  bool aligned;

  TE_GPU void operator()() const {
    const int64_t first = (gpu::block() * kThreads + gpu::thread()) * kGroup;
    if (first >= numel) return;
    const uint32_t bits = mask[first / kGroup];
    if (aligned && numel - first >= kGroup) {
      Group<T> in, result{};
      in.load(grad + first);
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        result.set(i, fake_quant::FakeQuant::backward(in.get(i), (bits >> i & 1) != 0));
      result.store(dx + first);
    } else {
      for (int i = 0; i < kGroup && first + i < numel; ++i)
        dx[first + i] = fake_quant::FakeQuant::backward(grad[first + i], (bits >> i & 1) != 0);
    }
  }
};

template <class Kernel>
void launch_over(const char* op, const Kernel& kernel, int64_t numel, Stream stream) {
  const int64_t groups = (numel + kGroup - 1) / kGroup;
  gpu::launch(op, kernel, {(groups + Kernel::kThreads - 1) / Kernel::kThreads}, stream);
}

}  // namespace

void fake_quant_forward(core::DType dtype, const FakeQuantJob& job, Stream stream) {
  const bool aligned = is_aligned(job.x) && is_aligned(job.out);
  const int64_t numel = job.layout.numel();
  with_type(dtype, [&]<class T>() {
    LearnedFakeQuants::for_each_on_host([&]<class F>(int32_t index) {
      if (index != job.learned) return;
      if (is_default(job))
        launch_over(F::name, Forward<T, true, F>{job, aligned}, numel, stream);
      else
        launch_over(F::name, Forward<T, false, F>{job, aligned}, numel, stream);
    });
    if (job.learned >= 0) return;
    if (is_default(job))
      launch_over("fake_quant", Forward<T, true, NotLearned>{job, aligned}, numel, stream);
    else
      launch_over("fake_quant", Forward<T, false, NotLearned>{job, aligned}, numel, stream);
  });
}

void fake_quant_backward(core::DType dtype, const void* grad, const uint8_t* mask, void* dx,
                         int64_t numel, Stream stream) {
  const bool aligned = is_aligned(grad) && is_aligned(dx);
  with_type(dtype, [&]<class T>() {
    launch_over("_fake_quant_backward",
                Backward<T>{static_cast<const T*>(grad), mask, static_cast<T*>(dx), numel, aligned},
                numel, stream);
  });
}

}  // namespace torch_ext::cuda
