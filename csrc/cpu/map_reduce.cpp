#include "cpu/map_reduce.h"

#include <algorithm>
#include <vector>

#include "core/parts.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "registry.h"

namespace torch_ext::cpu {
namespace {

// The sum of `count` values, in the order of core/learned.h. Overwrites the values.
double fold(double* values, int64_t count) {
  while (count > 1) {
    for (int64_t s = 0; s < core::sums_of(count); ++s) {
      double lane[core::kSumLanes] = {};
      const int64_t end = std::min(count, (s + 1) * core::kSumLength);
      for (int64_t i = s * core::kSumLength; i < end; ++i)
        lane[(i - s * core::kSumLength) % core::kSumLanes] += values[i];
      values[s] = core::sum_lanes(lane);
    }
    count = core::sums_of(count);
  }
  return count == 0 ? 0 : values[0];
}

}  // namespace

void learned_backward(core::DType dtype, const core::LearnedJob& job) {
  const MapReduceKernels& k = kernels().map_reduce;
  const int type = static_cast<int>(dtype);
  const core::ChannelLayout& layout = job.layout;
  if (layout.channels == 0) return;
  const core::Parts parts =
      layout.numel() == 0 ? core::Parts{false, 1, 0, 0} : core::parts_of(layout);
  std::vector<double> sums(2 * layout.channels * parts.count);
  double* const parameter = sums.data();
  double* const zero_point = sums.data() + layout.channels * parts.count;
  constexpr int64_t kValuesPerThread = 1 << 15;
  if (parts.rows) {
    const int64_t values = parts.per_part * layout.channels * layout.inner;
    parallel_for(0, parts.count, 1 + kValuesPerThread / values, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p)
        k.rows[type](job, p * parts.per_part, std::min((p + 1) * parts.per_part, layout.outer),
                     parts.count, parameter + p, zero_point + p);
    });
  } else {
    const int64_t all = layout.channels * parts.count;
    const int64_t values = std::min(parts.per_part, layout.inner);
    parallel_for(0, all, values == 0 ? 1 : 1 + kValuesPerThread / values,
                 [&](int64_t first, int64_t last) {
                   for (int64_t u = first; u < last; ++u) {
                     // Unit u, in memory order: [outer, channels, parts of a row].
                     const int64_t row = u / parts.per_row, part = u % parts.per_row;
                     const int64_t c = row % layout.channels, o = row / layout.channels;
                     const int64_t at = part * parts.per_part;
                     const int64_t index = c * parts.count + o * parts.per_row + part;
                     k.run[type](job, c, row * layout.inner + at,
                                 std::min(parts.per_part, layout.inner - at), parameter + index,
                                 zero_point + index);
                   }
                 });
  }
  for (int64_t c = 0; c < layout.channels; ++c) {
    const double sum = fold(parameter + c * parts.count, parts.count);
    const double zero_sum = fold(zero_point + c * parts.count, parts.count);
    store_gradients(job, c, sum, zero_sum);
  }
}

void learned_tangent(core::DType dtype, const core::TangentJob& job) {
  const MapReduceKernels::Tangent tangent = kernels().map_reduce.tangent[static_cast<int>(dtype)];
  constexpr int64_t kGrain = 1 << 14;
  parallel_for(0, job.layout.numel(), kGrain,
               [&](int64_t begin, int64_t end) { tangent(job, begin, end); });
}

}  // namespace torch_ext::cpu
