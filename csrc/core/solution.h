#pragma once

#include "core/cumulative.h"
#include "core/job.h"
#include "core/qparams.h"

// How the drivers of both devices check a statistic and store what a rule computed from it.
namespace torch_ext::core {

// A statistic may come from a file or from user code, so it is checked before anything is summed.

// Sums up to 2^16 counts that may be anything. They are too many for a comparison each.
struct CountSum {
  static constexpr int64_t kImpossible = -1;
  uint64_t total = 0;  // modulo 2^64
  uint64_t bits = 0;   // the sign bit is set if any count was negative
  uint64_t high = 0;   // of counts / 2^32, so it does not overflow

  TE_HD void add(int64_t count) {
    const uint64_t n = static_cast<uint64_t>(count);
    total += n;
    bits |= n;
    high += n >> 32;
  }
  // kImpossible where a count was negative or the sum does not fit 63 bits. What `high` leaves out
  // is less than 2^16 times 2^32, so with high <= 2^31 `total` is the sum itself.
  TE_HD int64_t value() const {
    const bool fits = high <= uint64_t{1} << 31 && (total | bits) >> 63 == 0;
    return fits ? static_cast<int64_t>(total) : kImpossible;
  }
};

// Whether zeros, tiny and `counted` values of the window's bins make up the finite values.
TE_HD bool are_the_values(const View& view, int64_t counted) {
  return view.zeros >= 0 && view.zeros <= view.finite && view.tiny >= 0 &&
         view.tiny <= view.finite - view.zeros && counted == view.finite - view.zeros - view.tiny;
}

// Whether the extrema are finite and in order.
TE_HD bool has_extrema(const ChannelStatistic& s) {
  return s.extrema[0] <= s.extrema[1] && s.extrema[0] - s.extrema[0] == 0 &&
         s.extrema[1] - s.extrema[1] == 0;
}

// Whether the tally is not that of merged statistics with more than 2^63 - 1 values, which wraps.
TE_HD bool has_tally(const ChannelStatistic& s) { return s.tally[kFinite] >= 0; }

// Stores channel c's range; where `moves`, the stored range moves part of the way to `solved`.
// Returns the range stored.
TE_HD Range store_range(const SolveJob& job, int64_t c, const Range& solved, bool moves) {
  float* const range = job.range + 2 * c;
  const float target[2] = {static_cast<float>(solved.lo), static_cast<float>(solved.hi)};
  for (int end = 0; end < 2; ++end) {
    const double from = range[end];
    range[end] = moves ? static_cast<float>(from + job.averaging_constant * (target[end] - from))
                       : target[end];
  }
  return {range[0], range[1]};
}

// Whether a job's range moves by averaging: not on the first batch, and not with
// averaging_constant 1.
TE_HD bool moves(const SolveJob& job) {
  return job.solved != nullptr && *job.solved != 0 && job.averaging_constant != 1;
}

// Whether averaging_constant 0 lets a channel's range be set, and it has been.
TE_HD bool is_set(const SolveJob& job, int64_t c) {
  return job.solved != nullptr && job.averaging_constant == 0 &&
         (job.range[2 * c] != 0 || job.range[2 * c + 1] != 0);
}

TE_HD void store_qparams(const SolveJob& job, int64_t c, const QParams& q) {
  job.scale[c] = q.scale;
  job.zero_point[c] = q.zero_point;
}

}  // namespace torch_ext::core
