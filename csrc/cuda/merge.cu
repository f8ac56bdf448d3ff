#include "cuda/driver.h"
#include "gpu.h"

// core::merge_channel with one block per channel.
namespace torch_ext::cuda {
namespace {

struct Merge {
  static constexpr int kThreads = 512;

  Statistic into;
  Statistic from;

  TE_GPU void operator()() const {
    const core::ChannelStatistic to = into.channel(gpu::block()),
                                 other = from.channel(gpu::block());
    int64_t& tiny = *static_cast<int64_t*>(gpu::shared());
    if (gpu::thread() == 0) tiny = 0;
    const float extrema[2] = {to.extrema[0], to.extrema[1]};
    const float others[2] = {other.extrema[0], other.extrema[1]};
    gpu::sync();
    const float lo = core::key_of(others[0]) < core::key_of(extrema[0])
                         ? core::positive_zero(others[0])
                         : extrema[0];
    const float hi = core::key_of(others[1]) > core::key_of(extrema[1])
                         ? core::positive_zero(others[1])
                         : extrema[1];
    if (into.layout.octaves != 0) {
      const int32_t bottom = into.layout.bottom(core::top_octave(lo, hi));
      // Both loops give a bin's slot to the same thread, whatever octave it holds, so they need no
      // barrier in between.
      int64_t fallen = empty_below(to, core::top_octave(extrema[0], extrema[1]), bottom);
      core::add_count(fallen,
                      add_counts(to, other, core::top_octave(others[0], others[1]), bottom));
      if (fallen != 0) gpu::add(&tiny, fallen);
      gpu::sync();
    }
    if (gpu::thread() != 0) return;
    to.extrema[0] = lo;
    to.extrema[1] = hi;
    for (int column = 0; column < core::kTallyColumns; ++column)
      core::add_count(to.tally[column], other.tally[column]);
    core::add_count(to.tally[core::kTiny], tiny);
  }

 private:
  // Calls visit(octave, bin) for the bins of both signs of the window that ends at `top`, spread
  // over all threads.
  template <class Visit>
  TE_GPU void each_bin(int32_t top, const Visit& visit) const {
    if (top == 0) return;
    const core::HistogramLayout layout = into.layout;
    const int64_t width = int64_t{1} << layout.mantissa_bits;
    for (int32_t octave = layout.bottom(top); octave <= top; ++octave)
      for (int64_t k = gpu::thread(); k < 2 * width; k += kThreads)
        visit(octave, layout.octave_begin(octave) + (k < width ? k : k - width + layout.bins()));
  }
  // Clears the octaves below `bottom`; returns how many values this thread removed.
  TE_GPU int64_t empty_below(const core::ChannelStatistic& to, int32_t top, int32_t bottom) const {
    int64_t fallen = 0;
    each_bin(top, [&](int32_t octave, int64_t bin) {
      if (octave >= bottom) return;
      core::add_count(fallen, to.counts[bin]);
      to.counts[bin] = 0;
    });
    return fallen;
  }
  // Adds the other statistic's counts; returns how many of this thread's values are below `bottom`.
  TE_GPU int64_t add_counts(const core::ChannelStatistic& to, const core::ChannelStatistic& other,
                            int32_t top, int32_t bottom) const {
    int64_t fallen = 0;
    each_bin(top, [&](int32_t octave, int64_t bin) {
      core::add_count(octave < bottom ? fallen : to.counts[bin], other.counts[bin]);
    });
    return fallen;
  }
};

}  // namespace

void merge(const Statistic& into, const Statistic& from, Stream stream) {
  gpu::launch("merge_", Merge{into, from}, {into.channels, sizeof(int64_t)}, stream);
}

}  // namespace torch_ext::cuda
