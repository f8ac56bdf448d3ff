#pragma once

#include <cstdint>

#include "core/lattice.h"
#include "gpu.h"

// Reductions over the threads of a block.
namespace torch_ext::cuda {

// Returns, on every thread, `value` of all threads reduced by `fold`: a minimum, a maximum or a sum
// of integers, so the order does not matter. `memory` [kThreads / 32] is in shared memory.
template <int kThreads, class T, class Fold>
TE_GPU T block_fold(T value, T* memory, const Fold& fold) {
  for (int lanes = gpu::kWarp / 2; lanes > 0; lanes /= 2)
    value = fold(value, gpu::shuffle_xor(value, lanes));
  gpu::sync();
  if (gpu::thread() % gpu::kWarp == 0) memory[gpu::thread() / gpu::kWarp] = value;
  gpu::sync();
  value = memory[0];
  for (int warp = 1; warp < kThreads / gpu::kWarp; ++warp) value = fold(value, memory[warp]);
  return value;
}

template <class T>
TE_GPU T smaller(T a, T b) {
  return b < a ? b : a;
}

// core::argmin, computed by a block.
template <int kThreads>
TE_GPU int64_t block_argmin(const double* objective, int64_t count, bool last, double* memory) {
  double least = __builtin_inf();
  for (int64_t i = gpu::thread(); i < count; i += kThreads) least = smaller(least, objective[i]);
  least = block_fold<kThreads>(least, memory, smaller<double>);
  if (!(least < __builtin_inf())) return -1;
  const double bound = core::tie_bound(least);
  // The largest index is the smallest of the negated ones.
  int64_t winner = INT64_MAX;
  for (int64_t i = gpu::thread(); i < count; i += kThreads)
    if (objective[i] <= bound) winner = smaller(winner, last ? -i : i);
  winner = block_fold<kThreads>(winner, reinterpret_cast<int64_t*>(memory), smaller<int64_t>);
  return last ? -winner : winner;
}

}  // namespace torch_ext::cuda
