#include <stdexcept>

#include "cuda/driver.h"

// The drivers of a build without CUDA. The ops raise for CUDA tensors before they call these.
namespace torch_ext::cuda {
namespace {

[[noreturn]] void refuse() { throw std::runtime_error("a build without CUDA kernels"); }

}  // namespace

bool available() { return false; }

size_t observe_scratch(const TensorView&, int32_t, const Statistic&) { refuse(); }
void observe(const TensorView&, int32_t, const Statistic&, ObserveMode, void*, Stream) { refuse(); }
void merge(const Statistic&, const Statistic&, Stream) { refuse(); }
size_t solve_scratch(const SolveJob*, int64_t) { refuse(); }
void solve(const SolveJob*, int64_t, void*, Stream) { refuse(); }
void qparams(const float*, int64_t, const core::Grid&, const float*, float*, int32_t*, Stream) {
  refuse();
}
size_t kl_threshold_scratch(int64_t, int64_t, int64_t, observers::KlVariant) { refuse(); }
void kl_threshold(const int64_t*, const double*, int64_t, int64_t, int64_t, observers::KlVariant,
                  int64_t*, double*, void*, Stream) {
  refuse();
}
void fake_quant_forward(core::DType, const core::FakeQuantJob&, Stream) { refuse(); }
size_t dynamic_scratch(const core::DynamicJob&) { refuse(); }
void dynamic_fake_quant(core::DType, const core::DynamicJob&, void*, Stream) { refuse(); }
void fake_quant_backward(core::DType, const void*, const uint8_t*, void*, int64_t, Stream) {
  refuse();
}
size_t learned_backward_scratch(const core::LearnedJob&) { refuse(); }
void learned_backward(core::DType, const core::LearnedJob&, void*, Stream) { refuse(); }
void learned_tangent(core::DType, const core::TangentJob&, Stream) { refuse(); }
bool follows_on_chip(int32_t, core::DType, const core::FakeQuantJob&) { refuse(); }
void follow_on_chip(const SolveJob&, core::DType, const core::FakeQuantJob&, Stream) { refuse(); }

}  // namespace torch_ext::cuda
