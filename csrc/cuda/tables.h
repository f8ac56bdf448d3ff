#pragma once

#include <cstdint>

#include "gpu.h"

// A block's counters of histogram bins. `add` may run on all threads at once; `clear` and `take`
// (reads a counter and sets it to 0) are for one thread per bin.
namespace torch_ext::cuda {

// Rules that read no histogram keep no counters.
struct NoTable {};

// 32 bits a bin: in shared memory, or in the block's scratch where that is too small.
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

// 16 bits a bin in shared memory, two bins a word, and 32 bits in the block's scratch. Whoever
// lifts a counter to kHalf takes kHalf away again and carries it. A counter is below kHalf when a
// chunk of values begins and cannot pass 2 kHalf - 1 before it ends, as long as a chunk has no more
// than kHalf values and a barrier follows it.
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
