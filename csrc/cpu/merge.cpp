#include "cpu/driver.h"
#include "cpu/parallel.h"

namespace torch_ext::cpu {

void merge(const Statistic& into, const Statistic& from) {
  constexpr int64_t kBinsPerThread = 1 << 17;
  const int64_t grain = 1 + kBinsPerThread / (into.layout.size() + 8);
  parallel_for(0, into.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const core::ChannelStatistic other = from.channel(c);
      core::merge_channel(into.channel(c), into.layout, other.extrema, other.tally, other.counts);
    }
  });
}

}  // namespace torch_ext::cpu
