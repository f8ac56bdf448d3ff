#pragma once

#include <cstdint>

#include "core/affine.h"
#include "core/dtype.h"

// The driver of element-wise fake-quant. Data is contiguous; x and out must not overlap. Results do
// not depend on the number of threads, nor on the instruction set.
namespace torch_ext::cpu {

// Contiguous data seen as [outer, channels, inner]; per tensor is [1, 1, n].
struct ChannelLayout {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  int64_t numel() const { return outer * channels * inner; }
};

// The unit that elements are handed to threads in. A multiple of 8, so that a byte of the mask
// belongs to one thread; its flags and staged qparams stay in the first-level cache.
constexpr int64_t kMapBlock = 1024;

// out and mask of elements [begin, end) of x, begin a multiple of kMapBlock.
struct MapTask {
  const void* x;
  void* out;
  uint8_t* mask;  // [(numel + 7) / 8] or null; bit i % 8 of byte i / 8 is element i
  ChannelLayout layout;
  const float* scale;         // [channels]
  const int32_t* zero_point;  // [channels]
  int32_t quant_min;
  int32_t quant_max;
  core::Rounding rounding;
  core::Mask mask_kind;
  bool stream;  // write past the caches
};

// Inner loops, compiled once per instruction set; indexed by DType.
struct MapKernels {
  using Forward = void (*)(const MapTask& task, int64_t begin, int64_t end);
  using Backward = void (*)(const void* grad, const uint8_t* mask, void* dx, int64_t begin,
                            int64_t end, bool stream);
  Forward forward[core::kDTypeCount];
  Backward backward[core::kDTypeCount];
};

// out = dequantize(quantize(x)), and where mask is not null one bit per element: the gradient
// passes. An invalid scale (<= 0, infinite, NaN) gives NaN; callers that can refuse it do so
// before.
void fake_quant_forward(core::DType dtype, const void* x, void* out, uint8_t* mask,
                        const ChannelLayout& layout, const float* scale, const int32_t* zero_point,
                        int32_t quant_min, int32_t quant_max, core::Rounding rounding,
                        core::Mask mask_kind);

// dx = grad where the bit is set, else 0.
void fake_quant_backward(core::DType dtype, const void* grad, const uint8_t* mask, void* dx,
                         int64_t numel);

}  // namespace torch_ext::cpu
