#pragma once

#include <cstdint>

#include "core/job.h"

// The driver of element-wise fake-quant. Results depend neither on the number of threads nor on the
// instruction set.
namespace torch_ext::cpu {

// Threads get elements in blocks of this size. A multiple of 8, so that no two threads write to one
// byte of the mask; small enough that a block's flags and staged qparams stay in the first-level
// cache.
constexpr int64_t kMapBlock = 1024;

struct MapTask : core::FakeQuantJob {
  bool stream;  // write past the caches
};

// Inner loops, compiled once per instruction set; indexed by DType.
struct MapKernels {
  // Writes out and mask of elements [begin, end) of x; begin is a multiple of kMapBlock.
  using Forward = void (*)(const MapTask& task, int64_t begin, int64_t end);
  using Backward = void (*)(const void* grad, const uint8_t* mask, void* dx, int64_t begin,
                            int64_t end, bool stream);
  Forward forward[core::kDTypeCount];
  Backward backward[core::kDTypeCount];
};

// out = dequantize(quantize(x)); where job.mask is not null, also one bit per element: whether its
// gradient passes. An invalid scale (<= 0, infinite, NaN) gives NaN; callers that can raise for it
// do so before.
void fake_quant_forward(core::DType dtype, const core::FakeQuantJob& job);

// dx = grad where the bit is set, else 0.
void fake_quant_backward(core::DType dtype, const void* grad, const uint8_t* mask, void* dx,
                         int64_t numel);

}  // namespace torch_ext::cpu
