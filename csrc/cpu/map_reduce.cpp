#include "cpu/map_reduce.h"

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "registry.h"

namespace torch_ext::cpu {
namespace {

constexpr int64_t kValuesPerThread = 1 << 15;

// The sum of `count` values, `stride` apart, in the order of core/learned.h. `sums` is memory for
// the sums of its first step.
double fold(const double* values, int64_t count, int64_t stride, std::vector<double>& sums) {
  while (count > 1) {
    sums.resize(std::max<size_t>(sums.size(), core::sums_of(count)));
    for (int64_t s = 0; s < core::sums_of(count); ++s) {
      double lane[core::kSumLanes] = {};
      const int64_t begin = s * core::kSumLength, n = std::min(count - begin, core::kSumLength);
      for (int64_t i = 0; i < n; ++i) lane[i % core::kSumLanes] += values[(begin + i) * stride];
      sums[s] = core::sum_lanes(lane, core::lanes_of(n));
    }
    count = core::sums_of(count);
    values = sums.data();
    stride = 1;
  }
  return count == 0 ? 0 : values[0];
}

// Splits [outer, channels, inner] among the threads, in outer rows where there are several, which
// come in multiples of `boundary`, else in channels.
template <class Body>
void parallel_rows(const core::ChannelLayout& layout, int64_t boundary, const Body& body) {
  const int64_t blocks = (layout.outer + boundary - 1) / boundary;
  if (blocks > 1) {
    const int64_t values = boundary * layout.channels * layout.inner;
    parallel_for(0, blocks, 1 + kValuesPerThread / values, [&](int64_t first, int64_t last) {
      body(RowRange{first * boundary, std::min(last * boundary, layout.outer), 0, layout.channels});
    });
  } else {
    const int64_t values = layout.outer * layout.inner;
    parallel_for(
        0, layout.channels, 1 + kValuesPerThread / values,
        [&](int64_t first, int64_t last) { body(RowRange{0, layout.outer, first, last}); });
  }
}

// Of sums [parts, channels] where parts are rows, else [channels, parts].
void store_sums(const core::LearnedJob& job, const core::Parts& parts, const double* parameter,
                const double* clipped) {
  const int64_t channels = job.layout.channels;
  const int64_t step = parts.rows ? 1 : parts.count, stride = parts.rows ? channels : 1;
  const bool has_clipped = job.d_zero_point != nullptr || job.d_mixed != nullptr;
  parallel_for(
      0, channels, 1 + kValuesPerThread / (1 + parts.count), [&](int64_t first, int64_t last) {
        std::vector<double> own;
        for (int64_t c = first; c < last; ++c) {
          const double sum = fold(parameter + c * step, parts.count, stride, own);
          const double other = has_clipped ? fold(clipped + c * step, parts.count, stride, own) : 0;
          store_gradients(job, c, sum, other);
        }
      });
}

}  // namespace

void learned_backward(core::DType dtype, const core::LearnedJob& job) {
  const MapReduceKernels& k = kernels().map_reduce;
  const int type = static_cast<int>(dtype);
  const core::ChannelLayout& layout = job.layout;
  if (layout.channels == 0) return;
  const core::Parts parts =
      layout.numel() == 0 ? core::Parts{false, 1, 0, 0} : core::parts_of(layout);
  std::vector<double> sums(job.d_parameter == nullptr ? 0 : 2 * layout.channels * parts.count);
  double* const parameter = sums.data();
  double* const clipped = job.d_parameter == nullptr ? nullptr : parameter + sums.size() / 2;
  const auto at = [](double* to, int64_t i) { return to == nullptr ? nullptr : to + i; };
  if (parts.rows) {
    parallel_rows(layout, parts.per_part, [&](const RowRange& range) {
      k.rows[type](job, parts, range, parameter, clipped);
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
                     const int64_t from = part * parts.per_part;
                     const int64_t index = c * parts.count + o * parts.per_row + part;
                     k.run[type](job, c, row * layout.inner + from,
                                 std::min(parts.per_part, layout.inner - from),
                                 at(parameter, index), at(clipped, index));
                   }
                 });
  }
  if (job.d_parameter != nullptr) store_sums(job, parts, parameter, clipped);
}

void learned_tangent(core::DType dtype, const core::TangentJob& job) {
  const MapReduceKernels& k = kernels().map_reduce;
  const int type = static_cast<int>(dtype);
  if (job.layout.numel() == 0) return;
  if (job.layout.channels > 1 && job.layout.inner <= kStagedRow)
    parallel_rows(job.layout, 1, [&](const RowRange& range) { k.tangent_rows[type](job, range); });
  else
    parallel_for(0, job.layout.numel(), kValuesPerThread / 2,
                 [&](int64_t begin, int64_t end) { k.tangent[type](job, begin, end); });
}

}  // namespace torch_ext::cpu
