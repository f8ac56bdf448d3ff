#include <algorithm>
#include <atomic>

#include "cpu/driver.h"
#include "cpu/map.h"
#include "cpu/parallel.h"
#include "rule_table.h"

// Observe, follow and fake-quantize, some channels at a time, while their values are in a thread's
// second-level cache.
namespace torch_ext::cpu {
namespace {

using core::FakeQuantJob;

// Bytes of the values of the channels handled together, at most: half of a small second-level
// cache. At least kPerThread values, or waking a thread takes longer than the work.
constexpr int64_t kCached = 256 << 10;
constexpr int64_t kPerThread = 1 << 15;
// With fewer pieces for each thread, some threads would wait for the others.
constexpr int64_t kPieces = 4;

int64_t unit_of(core::DType dtype, const FakeQuantJob& map) {
  return rows_in_lines(map.layout.inner * size_of(dtype));
}

template <class T>
T* from(T* of_channels, int64_t first) {
  return of_channels == nullptr ? nullptr : of_channels + first;
}

// What is said of channels [first, first + count).
SolveJob part_of(const SolveJob& job, int64_t first, int64_t count, uint8_t* solved) {
  SolveJob part = job;
  const core::ChannelStatistic statistic = job.statistic.channel(first);
  part.statistic.extrema = statistic.extrema;
  part.statistic.tally = statistic.tally;
  part.statistic.channels = count;
  part.range = job.range + 2 * first;
  part.scale = from(job.scale, first);
  part.zero_point = from(job.zero_point, first);
  part.solved = solved;
  return part;
}

FakeQuantJob part_of(const FakeQuantJob& map, core::DType dtype, int64_t first, int64_t count) {
  FakeQuantJob part = map;
  const int64_t values = first * map.layout.inner, bytes = values * size_of(dtype);
  part.x = static_cast<const char*>(map.x) + bytes;
  part.out = static_cast<char*>(map.out) + bytes;
  part.mask = from(map.mask, values / 8);
  part.layout.channels = count;
  part.scale = map.scale + first;
  part.zero_point = from(map.zero_point, first);
  return part;
}

}  // namespace

bool follows_on_chip(int32_t rule, core::DType dtype, const FakeQuantJob& map) {
  const core::ChannelLayout& layout = map.layout;
  if (rules()[rule].needs != core::Needs::extrema || layout.outer != 1 || layout.channels == 1)
    return false;
  const int64_t unit = unit_of(dtype, map);
  return layout.inner <= kCached / size_of(dtype) / unit &&
         layout.channels >= kPieces * unit * num_threads();
}

void follow_on_chip(const SolveJob& job, core::DType dtype, const FakeQuantJob& map) {
  const core::ChannelLayout& layout = map.layout;
  const int64_t unit = unit_of(dtype, map);
  const int64_t values =
      std::clamp(layout.numel() / (kPieces * num_threads()), kPerThread, kCached / size_of(dtype));
  const int64_t most = std::min(values / layout.inner, kGridTile);
  const int64_t count = std::max<int64_t>(1, most / unit) * unit;
  const bool stream = streams(dtype, layout.numel(), map.out);
  // All channels move as the flag tells that was found.
  const uint8_t found = *job.solved;
  std::atomic<bool> solved = false;
  const int64_t pieces = (layout.channels + count - 1) / count;
  parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * count, here = std::min(count, layout.channels - first);
      uint8_t flag = found;
      const SolveJob solve_job = part_of(job, first, here, &flag);
      const FakeQuantJob map_job = part_of(map, dtype, first, here);
      const int64_t sizes[] = {here, layout.inner}, strides[] = {layout.inner, 1};
      observe({map_job.x, dtype, 2, sizes, strides}, 0, solve_job.statistic);
      solve(&solve_job, 1);
      fake_quant_part(dtype, map_job, stream);
      if (flag == 1) solved = true;
    }
  });
  if (solved) *job.solved = 1;
}

}  // namespace torch_ext::cpu
