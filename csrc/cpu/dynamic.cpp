#include "cpu/dynamic.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/qparams.h"
#include "cpu/driver.h"
#include "cpu/kernels.h"
#include "cpu/map.h"
#include "cpu/parallel.h"

namespace torch_ext::cpu {
namespace {

using core::DynamicJob;
using core::FakeQuantJob;

// Bytes of the values that are looked at and then quantized, at most, if a group is not longer: a
// part of a core's first-level cache, as what comes next is fetched at the same time. Groups of up
// to kLongest stay in the second-level cache.
constexpr int64_t kChunk = 8 << 10, kLongest = 256 << 10;
// The least number of values for a thread.
constexpr int64_t kPerThread = 1 << 15;
constexpr int64_t kMostGroups = kGridTile;

// A symmetric grid with values of both signs needs magnitudes alone.
bool reads_magnitudes(const core::Grid& grid) { return grid.symmetric && !grid.is_unsigned(); }

float tensor_scale_of(const DynamicJob& job) {
  return job.tensor_scale == nullptr ? 0 : *job.tensor_scale;
}

// Scale and zero point of each group. The latter only where magnitudes are not enough.
void find_scales(const DynamicKernels& k, core::DType dtype, const DynamicJob& job, float* scale,
                 int32_t* zero_point) {
  const int type = static_cast<int>(dtype);
  float least[kMostGroups], largest[kMostGroups];
  if (reads_magnitudes(job.grid)) {
    k.bounds[type](job.x, job.group_size, job.groups, largest);
    k.scales(job.grid, tensor_scale_of(job), largest, job.groups, scale);
    return;
  }
  k.extrema[type](job.x, job.group_size, job.groups, least, largest);
  for (int64_t i = 0; i < job.groups; ++i) {
    const core::QParams q = core::qparams({least[i], largest[i]}, job.grid, tensor_scale_of(job));
    scale[i] = q.scale;
    zero_point[i] = q.zero_point;
  }
}

// Groups [first, first + count) of the job.
DynamicJob part_of(const DynamicJob& job, core::DType dtype, int64_t first, int64_t count) {
  DynamicJob part = job;
  const int64_t values = first * job.group_size, bytes = values * size_of(dtype);
  part.x = static_cast<const char*>(job.x) + bytes;
  part.out = static_cast<char*>(job.out) + bytes;
  if (job.mask != nullptr) part.mask = job.mask + values / 8;
  part.groups = count;
  return part;
}

// Groups that no core's cache holds: all scales first.
void in_two_passes(core::DType dtype, const DynamicJob& job) {
  std::vector<float> extrema(2 * job.groups), scale(job.groups);
  std::vector<int64_t> tally(core::kTallyColumns * job.groups);
  std::vector<int32_t> zero_point(job.groups);
  const core::Statistic statistic{extrema.data(), tally.data(), nullptr, job.groups, {}};
  for (int64_t g = 0; g < job.groups; ++g) {
    extrema[2 * g] = INFINITY;
    extrema[2 * g + 1] = -INFINITY;
  }
  const int64_t sizes[] = {job.groups, job.group_size}, strides[] = {job.group_size, 1};
  observe({job.x, dtype, 2, sizes, strides}, 0, statistic);
  for (int64_t g = 0; g < job.groups; ++g) {
    const core::ChannelStatistic of = statistic.channel(g);
    const bool finite = of.tally[core::kFinite] == job.group_size;
    const core::QParams q =
        core::qparams({of.extrema[0], of.extrema[1]}, job.grid, tensor_scale_of(job));
    scale[g] = finite ? q.scale : NAN;
    zero_point[g] = q.zero_point;
  }
  fake_quant_forward(dtype, core::with_scales(job, scale.data(), zero_point.data()));
}

}  // namespace

void dynamic_fake_quant(core::DType dtype, const DynamicJob& job) {
  const int64_t numel = job.groups * job.group_size;
  if (numel == 0) return;
  const int64_t group = job.group_size * size_of(dtype);
  const int64_t unit = rows_in_lines(group);
  if (group > kLongest / unit && job.groups * group > kLongest) return in_two_passes(dtype, job);
  const int64_t most = std::min(kChunk / group, kMostGroups);
  const int64_t count = std::max<int64_t>(1, most / unit) * unit;
  const int64_t chunks = (job.groups + count - 1) / count;
  const int64_t grain = std::max<int64_t>(1, kPerThread / (count * job.group_size));
  const bool stream = streams(dtype, numel, job.out);
  const DynamicKernels& k = kernels().dynamic;
  const bool is_plain = job.rounding == core::Rounding::half_even &&
                        job.group_size % (dtype == core::DType::f64 ? 8 : 16) == 0;
  const bool has_zero_points = !reads_magnitudes(job.grid);
  parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    float scale[kMostGroups];
    int32_t zero_point[kMostGroups];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * count, here = std::min(count, job.groups - first);
      const DynamicJob part = part_of(job, dtype, first, here);
      find_scales(k, dtype, part, scale, zero_point);
      const FakeQuantJob map =
          core::with_scales(part, scale, has_zero_points ? zero_point : nullptr);
      if (is_plain)
        k.map[static_cast<int>(dtype)]({map, stream}, count * job.group_size);
      else
        fake_quant_part(dtype, map, stream);
    }
  });
}

}  // namespace torch_ext::cpu
