#pragma once

#include <cstdint>

#include "core/job.h"

// The driver of element-wise fake-quant. Results depend neither on the number of threads nor on the
// instruction set.
namespace torch_ext::cpu {

// Threads get elements in blocks of this size. A multiple of 8, so that no two threads write to one
// byte of the mask, and of 64 bytes, so that they can be written past the caches.
constexpr int64_t kMapBlock = 1024;

// The grids of so many channels are staged by each thread; those of more, once for all threads, if
// every channel has several rows.
constexpr int64_t kGridTile = 1024;
// Channels, the first ones again, that follow the last one in a table of grids.
constexpr int64_t kGridPadding = 16;

struct MapTask : core::FakeQuantJob {
  bool stream;  // write past the caches
  // The grids of all channels, or null: arrays of scale, lo, hi and zero point, of
  // channels + kGridPadding values of the computing type each.
  const void* grids = nullptr;
};

// Inner loops, compiled once per instruction set; indexed by DType.
struct MapKernels {
  // Writes the grids of channels [first, first + count) into a table of `channels` of them that
  // begins with channel `begin`. Channels are counted on after the last one.
  using Stage = void (*)(const core::FakeQuantJob& job, int64_t first, int64_t count, int64_t begin,
                         int64_t channels, void* grids);
  // Writes out and mask of elements [begin, end) of x; begin is a multiple of kMapBlock.
  using Forward = void (*)(const MapTask& task, int64_t begin, int64_t end);
  using Backward = void (*)(const void* grad, const uint8_t* mask, void* dx, int64_t begin,
                            int64_t end, bool stream);
  Stage stage[core::kDTypeCount];
  Forward forward[core::kDTypeCount];
  Backward backward[core::kDTypeCount];
};

// out = dequantize(quantize(x)); where job.mask is not null, also one bit per element: whether its
// gradient passes. An invalid scale (<= 0, infinite, NaN) gives NaN; callers that can raise for it
// do so before.
void fake_quant_forward(core::DType dtype, const core::FakeQuantJob& job);

// The same for whole rows of a larger job: `stream`, whether to write past the caches, is decided
// for that one. The part's output then begins and ends at multiples of 64 bytes.
void fake_quant_part(core::DType dtype, const core::FakeQuantJob& job, bool stream);

// Whether so many values are written to `out` past the caches.
bool streams(core::DType dtype, int64_t numel, const void* out);

// The least number of rows of so many bytes that fill whole lines of the cache, so that they can be
// written past the caches, and whole bytes of the mask.
int64_t rows_in_lines(int64_t bytes);

// Bytes of a value.
int64_t size_of(core::DType dtype);

// dx = grad where the bit is set, else 0.
void fake_quant_backward(core::DType dtype, const void* grad, const uint8_t* mask, void* dx,
                         int64_t numel);

}  // namespace torch_ext::cpu
