#pragma once

#include <cstdint>

#include "gpu.h"

// A block's counters of histogram bins. All threads may call `add` at the same time. `clear` and
// `take`, which reads a counter and sets it to 0, may be called by one thread per bin.
namespace torch_ext::cuda {

// For rules that read no histogram.
struct NoTable {};

// 32 bits per bin, in shared memory, or in the block's scratch memory where that is too small.
struct WideTable {
  static constexpr int64_t kSharedBytes = 4;  // per bin
  uint32_t* counts;

  TE_GPU void clear(int64_t bin) const { counts[bin] = 0; }
  TE_GPU void add(uint32_t bin, uint32_t n) const { gpu::add(counts + bin, n); }
  TE_GPU uint32_t take(int64_t bin) const {
    const uint32_t n = counts[bin];
    counts[bin] = 0;
    return n;
  }
};

// 16 bits per bin in shared memory, two bins in a word, and a carry of 32 bits per bin in the
// block's scratch memory. The thread whose increment makes a counter reach kHalf subtracts kHalf
// and adds it to the carry. So a counter is below kHalf at the start of a chunk of values, and does
// not overflow within it as long as a chunk has at most kHalf values and a barrier follows it.
struct NarrowTable {
  static constexpr int64_t kSharedBytes = 2;
  static constexpr uint32_t kHalf = 0x8000;
  uint32_t* pairs;
  uint32_t* carry;

  TE_GPU static int shift(int64_t bin) { return 16 * static_cast<int>(bin & 1); }

  TE_GPU void clear(int64_t bin) const {
    if ((bin & 1) == 0) pairs[bin / 2] = 0;
    carry[bin] = 0;
  }
  TE_GPU void add(uint32_t bin, uint32_t n) const {
    const uint32_t old = gpu::fetch_add(pairs + bin / 2, n << shift(bin)) >> shift(bin) & 0xffff;
    if (old >= kHalf || old + n < kHalf) return;
    gpu::add(pairs + bin / 2, 0 - (kHalf << shift(bin)));
    gpu::add(carry + bin, kHalf);
  }
  TE_GPU uint32_t take(int64_t bin) const {
    const uint32_t low = pairs[bin / 2] >> shift(bin) & 0xffff;
    if (low != 0) gpu::add(pairs + bin / 2, 0 - (low << shift(bin)));
    const uint32_t n = low + carry[bin];
    carry[bin] = 0;
    return n;
  }
};

}  // namespace torch_ext::cuda
