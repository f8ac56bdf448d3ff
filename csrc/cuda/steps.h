#pragma once

#include "core/solution.h"
#include "cuda/block.h"
#include "cuda/rows.h"
#include "gpu.h"

// Solves all quantizers of a list in one launch. A row is a channel of a job. A row whose rule
// reads only extrema is solved by one thread. The others take these steps, with a barrier of all
// blocks after each: totals of octaves, prefix sums (the view), closed rules and preparation of
// searches, objectives of all candidates, winners.
namespace torch_ext::cuda {

constexpr int kSolveThreads = 256;
constexpr int kSolveWarps = kSolveThreads / gpu::kWarp;

// The end of a row's memory, behind the words of its view, those of its search and its objectives.
struct RowState {
  alignas(16) unsigned char search[512];
  core::View view;
  int64_t candidates;
  bool valid;
  int64_t totals[2][32];  // values per sign and octave
};

struct RowLayout {
  int64_t work;        // offset in a row of the words of its search, in words
  int64_t objectives;  // offset of its objectives
  int64_t state;       // offset of its RowState
  int64_t stride;      // size of a row, in words
  int64_t groups;      // the most warps that a row's candidates need
};

// The steps, for the rows of tasks[0 .. count). The first `extrema_rows` rows read nothing but
// extrema. There is memory for `wave` of the others at a time.
struct Steps {
  const Task* tasks;
  int32_t count;
  int64_t extrema_rows;
  int64_t rows;
  int64_t wave;
  RowLayout layout;
  int64_t* memory;

  TE_GPU void operator()() const {
    for (int64_t row = gpu::block() * kSolveThreads + gpu::thread(); row < extrema_rows;
         row += gpu::blocks() * kSolveThreads)
      solve_extrema(row_of(row));
    for (int64_t begin = extrema_rows; begin < rows; begin += wave) {
      const int64_t end = begin + wave < rows ? begin + wave : rows;
      each_warp((end - begin) * 64, [&](int64_t i) { add_octave(begin, begin + i / 64, i % 64); });
      gpu::sync_blocks();
      each_warp((end - begin) * 32, [&](int64_t i) { fill_octave(begin, begin + i / 32, i % 32); });
      gpu::sync_blocks();
      for (int64_t row = begin + gpu::block(); row < end; row += gpu::blocks()) prepare(begin, row);
      gpu::sync_blocks();
      each_warp((end - begin) * layout.groups,
                [&](int64_t i) { evaluate(begin, begin + i / layout.groups, i % layout.groups); });
      gpu::sync_blocks();
      for (int64_t row = begin + gpu::block(); row < end; row += gpu::blocks()) decide(begin, row);
      gpu::sync_blocks();
    }
    // Before a flag is set every row has to have read it. With histogram rows the last barrier
    // above ensured that.
    if (extrema_rows == rows) gpu::sync_blocks();
    for (int64_t row = gpu::block() * kSolveThreads + gpu::thread(); row < rows;
         row += gpu::blocks() * kSolveThreads)
      mark(row);
  }

 private:
  // ---- rows

  TE_GPU Row row_of(int64_t row) const {
    int32_t low = 0, high = count - 1;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (row < tasks[middle].end)
        high = middle;
      else
        low = middle + 1;
    }
    return {tasks[low], row - (low == 0 ? 0 : tasks[low - 1].end)};
  }
  TE_GPU int64_t* words(int64_t begin, int64_t row) const {
    return memory + (row - begin) * layout.stride;
  }
  TE_GPU RowState& state(int64_t begin, int64_t row) const {
    return *reinterpret_cast<RowState*>(words(begin, row) + layout.state);
  }
  TE_GPU double* objectives(int64_t begin, int64_t row) const {
    return reinterpret_cast<double*>(words(begin, row) + layout.objectives);
  }
  // Consecutive items go to different blocks, so that few items use all blocks.
  template <class F>
  TE_GPU static void each_warp(int64_t items, const F& f) {
    const int64_t warp = gpu::thread() / gpu::kWarp * gpu::blocks() + gpu::block();
    for (int64_t i = warp; i < items; i += gpu::blocks() * kSolveWarps) f(i);
  }

  TE_GPU void mark(int64_t index) const {
    const Row row = row_of(index);
    uint8_t* const flag = row.task.job.solved;
    if (flag != nullptr && *flag == 0 && row.is_solved()) *flag = 1;
  }

  // ---- steps

  TE_GPU core::View frame(int64_t begin, int64_t index, const Row& row) const {
    const core::ChannelStatistic s = row.statistic();
    return core::frame_view(row.task.job.statistic.layout, row.task.needs, s.extrema, s.tally,
                            s.counts, words(begin, index));
  }
  // The bins of an octave of the window, lowest first.
  TE_GPU static const int64_t* bins(const Row& row, const core::View& view, int sign,
                                    int64_t octave) {
    return row.statistic().counts + sign * view.layout.bins() +
           view.layout.octave_begin(view.bottom + static_cast<int32_t>(octave));
  }
  // Number of an octave's bins for each lane.
  TE_GPU static int64_t share(const core::View& view) {
    const int64_t width = int64_t{1} << view.layout.mantissa_bits;
    return (width + gpu::kWarp - 1) / gpu::kWarp;
  }

  // A warp counts the values in one octave of one sign.
  TE_GPU void add_octave(int64_t begin, int64_t index, int64_t part) const {
    const Row row = row_of(index);
    const int sign = static_cast<int>(part / 32);
    const int64_t octave = part % 32;
    if (row.is_frozen()) return;
    const core::View view = frame(begin, index, row);
    core::CountSum sum;
    if (octave < view.bins >> view.layout.mantissa_bits) {
      const int64_t* const from = bins(row, view, sign, octave);
      for (int64_t k = gpu::thread() % gpu::kWarp; k < int64_t{1} << view.layout.mantissa_bits;
           k += gpu::kWarp)
        sum.add(from[k]);
    }
    const int64_t total = warp_sum(sum).value();
    if (gpu::thread() % gpu::kWarp == 0) state(begin, index).totals[sign][octave] = total;
  }
  TE_GPU static core::CountSum warp_sum(core::CountSum sum) {
    for (int lanes = 1; lanes < gpu::kWarp; lanes *= 2) {
      sum.total += gpu::shuffle_xor(sum.total, lanes);
      sum.bits |= gpu::shuffle_xor(sum.bits, lanes);
      sum.high += gpu::shuffle_xor(sum.high, lanes);
    }
    return sum;
  }
  TE_GPU static int64_t warp_sum(int64_t value) {
    for (int lanes = 1; lanes < gpu::kWarp; lanes *= 2) value += gpu::shuffle_xor(value, lanes);
    return value;
  }
  // Sum over the lanes before this one.
  TE_GPU static int64_t warp_before(int64_t value) {
    int64_t before = 0;
    for (int lanes = 1; lanes < gpu::kWarp; lanes *= 2) {
      const int64_t other = gpu::shuffle_xor(value, lanes);
      if ((gpu::thread() & lanes) != 0) before += other;
      value += other;
    }
    return before;
  }

  // A warp computes the prefix sums over one octave, for both signs.
  TE_GPU void fill_octave(int64_t begin, int64_t index, int64_t octave) const {
    const Row row = row_of(index);
    if (row.is_frozen()) return;
    const core::View view = frame(begin, index, row);
    const core::ViewArrays arrays = core::view_arrays(view.layout, words(begin, index));
    const int lane = gpu::thread() % gpu::kWarp;
    const int32_t m = view.layout.mantissa_bits;
    const int64_t octaves = view.bins >> m;
    if (octave == 0 && lane == 0) {
      arrays.below[0][0] = arrays.below[1][0] = 0;
      arrays.magnitude[0] = core::magnitude_below(view, arrays, 0);
    }
    if (octave >= octaves) return;
    // Of a statistic that contradicts itself no sum is taken.
    const auto& totals = state(begin, index).totals;
    core::CountSum counted;
    for (int sign = 0; sign < 2; ++sign) counted.add(totals[sign][lane]);
    if (!core::are_the_values(view, warp_sum(counted).value())) return;
    const bool moments = core::fills_moments(view, row.task.needs);
    const int64_t from = lane * share(view), width = int64_t{1} << m;
    const int64_t to = smaller(from + share(view), width);
    for (int sign = 0; sign < 2; ++sign) {
      const int64_t* const counts = bins(row, view, sign, octave);
      const int64_t lower =
          warp_sum(lane < octave ? state(begin, index).totals[sign][lane] : int64_t{0});
      const core::Prefix own = core::prefix_of(counts, from, to, moments);
      const core::Prefix before = {lower + warp_before(own.count), warp_before(own.first),
                                   warp_before(own.second)};
      core::fill_octave(arrays, view.layout, moments, sign, octave, counts, from, to, before);
    }
    for (int64_t i = (octave << m) + from + 1; i <= (octave << m) + to; ++i)
      arrays.magnitude[i] = core::magnitude_below(view, arrays, i);
  }

  // One thread solves a closed rule, or prepares a search.
  TE_GPU void prepare(int64_t begin, int64_t index) const {
    if (gpu::thread() != 0) return;
    const Row row = row_of(index);
    const Task& task = row.task;
    RowState& s = state(begin, index);
    s.candidates = 0;
    s.valid = false;
    if (store_if_empty(row)) return;
    s.view = frame(begin, index, row);
    core::CountSum counted;
    for (int sign = 0; sign < 2; ++sign)
      for (int octave = 0; octave < 32; ++octave) counted.add(s.totals[sign][octave]);
    if (!core::has_extrema(row.statistic()) || !core::are_the_values(s.view, counted.value()))
      return store(row, nan_range());
    if (task.needs == core::Needs::moments) core::add_moments(s.view);
    s.valid = true;
    with_rule(task.job.rule, [&]<class R>() {
      if constexpr (core::SearchRule<R>) {
        static_assert(sizeof(typename R::Search) <= sizeof s.search);
        auto& search = *reinterpret_cast<typename R::Search*>(s.search);
        search = R::prepare(s.view, task.job.grid, task.options, words(begin, index) + layout.work);
        s.candidates = search.count;
      } else if constexpr (core::ClosedRule<R> && R::needs >= core::Needs::counts) {
        store(row, R::solve(s.view, task.job.grid, task.options));
      }
    });
  }

  // A warp computes objectives, one candidate per lane.
  TE_GPU void evaluate(int64_t begin, int64_t index, int64_t group) const {
    const RowState& s = state(begin, index);
    const int64_t i = group * gpu::kWarp + gpu::thread() % gpu::kWarp;
    if (i >= s.candidates) return;
    with_rule(row_of(index).task.job.rule, [&]<class R>() {
      if constexpr (core::SearchRule<R>) {
        const auto search = *reinterpret_cast<const typename R::Search*>(s.search);
        R::template objectives<1>(search, i, i + 1, __builtin_inf(), objectives(begin, index));
      }
    });
  }

  template <class R>
  TE_GPU static double threshold_of(const core::View& view, const typename R::Search& search,
                                    int64_t winner) {
    const double largest = view.largest();
    return winner < 0 ? largest : smaller(R::threshold(search, winner), largest);
  }

  // The searches of a composite rule, each by the whole block.
  struct BlockThresholds {
    const core::View& view;
    const core::Grid& grid;
    RowState& state;
    int64_t* work;

    template <class R>
    TE_GPU double threshold(const double* options) const {
      auto& shared_search = *reinterpret_cast<typename R::Search*>(state.search);
      gpu::sync();
      if (gpu::thread() == 0) shared_search = R::prepare(view, grid, options, work);
      gpu::sync();
      const auto search = shared_search;
      double* const objectives =
          reinterpret_cast<double*>(work + R::search_words(view.layout, grid, options));
      for (int64_t i = gpu::thread(); i < search.count; i += kSolveThreads)
        R::template objectives<1>(search, i, i + 1, __builtin_inf(), objectives);
      gpu::sync();
      return threshold_of<R>(view, search,
                             block_argmin<kSolveThreads>(objectives, search.count, search.last_wins,
                                                         static_cast<double*>(gpu::shared())));
    }
  };

  // A block chooses the winner of a search, or solves a composite rule.
  TE_GPU void decide(int64_t begin, int64_t index) const {
    RowState& s = state(begin, index);
    if (!s.valid) return;
    const Row row = row_of(index);
    const Task& task = row.task;
    with_rule(task.job.rule, [&]<class R>() {
      if constexpr (core::SearchRule<R>) {
        const auto& search = *reinterpret_cast<const typename R::Search*>(s.search);
        const int64_t winner =
            block_argmin<kSolveThreads>(objectives(begin, index), s.candidates, search.last_wins,
                                        static_cast<double*>(gpu::shared()));
        if (gpu::thread() == 0)
          store(row, core::range_of_threshold(s.view, threshold_of<R>(s.view, search, winner)));
      } else if constexpr (core::CompositeRule<R> && !core::ClosedRule<R>) {
        const BlockThresholds thresholds{s.view, task.job.grid, s,
                                         words(begin, index) + layout.work};
        const core::Range range = R::solve(s.view, task.job.grid, task.options, thresholds);
        if (gpu::thread() == 0) store(row, range);
      }
    });
    gpu::sync();
  }
};

}  // namespace torch_ext::cuda
