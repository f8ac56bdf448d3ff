#include "cpu/solve.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/lattice.h"
#include "core/solution.h"
#include "cpu/driver.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "rule_table.h"

namespace torch_ext::cpu {
namespace {

// Memory and steps of one channel's solve.
class Channel {
 public:
  Channel(const SolveJob& job, int64_t channel, std::vector<int64_t>& memory)
      : job_(job), rule_(rules()[job.rule]), channel_(channel) {
    const core::HistogramLayout layout = job.statistic.layout;
    view_words_ = core::view_words(layout, rule_.needs);
    const int64_t words = view_words_ + work_words(job.rule, layout, job.grid, job.options);
    if (static_cast<int64_t>(memory.size()) < words) memory.resize(words);
    memory_ = memory.data();
  }

  void solve(bool parallel) {
    const SolveKernels& k = kernels().solve;
    const core::ChannelStatistic s = job_.statistic.channel(channel_);
    const bool has_values = rule_.needs == core::Needs::nothing || s.tally[core::kFinite] != 0;
    if (job_.solved != nullptr && (!has_values || core::is_set(job_, channel_))) return;
    core::Range range{0, 0};
    if (has_values) {
      check(s);
      const core::View view =
          rule_.needs == core::Needs::nothing
              ? core::View{}
              : k.view(job_.statistic.layout, rule_.needs, s.extrema, s.tally, s.counts, memory_);
      range = rule_.search_words != nullptr
                  ? search(view, parallel)
                  : k.closed(job_.rule, view, job_.grid, job_.options, words());
    }
    store(range);
  }

 private:
  int64_t* words() { return memory_ + view_words_; }

  core::Range search(const core::View& view, bool parallel) {
    const SolveKernels& k = kernels().solve;
    SearchStorage storage;
    const int64_t count = k.prepare(job_.rule, view, job_.grid, job_.options, words(), &storage);
    std::vector<double> objectives(count);
    const double bound = k.bound(job_.rule, storage, objectives.data());
    const auto evaluate = [&](int64_t begin, int64_t end) {
      k.objectives(job_.rule, storage, begin, end, bound, objectives.data());
    };
    constexpr int64_t kGrain = 16;
    if (parallel)
      parallel_for(0, count, kGrain, evaluate);
    else
      evaluate(0, count);
    return core::range_of_threshold(view, k.threshold(job_.rule, view, storage, objectives.data()));
  }

  void check(const core::ChannelStatistic& s) const {
    if (rule_.needs == core::Needs::nothing) return;
    if (!core::has_tally(s))
      throw std::invalid_argument("expected tally to be of at most 2^63 - 1 finite values, got " +
                                  std::to_string(s.tally[core::kFinite]) + in_channel());
    if (!core::has_extrema(s))
      throw std::invalid_argument("expected extrema to be finite and in order, got " +
                                  std::to_string(s.extrema[0]) + " and " +
                                  std::to_string(s.extrema[1]) + in_channel());
    if (rule_.needs < core::Needs::counts) return;
    const core::View frame =
        core::frame_view(job_.statistic.layout, rule_.needs, s.extrema, s.tally, s.counts, memory_);
    const int64_t counted = counted_in(frame, s.counts);
    if (core::are_the_values(frame, counted)) return;
    throw std::invalid_argument(
        "expected counts to be, with zeros and tiny, the " + std::to_string(frame.finite) +
        " finite values of tally, got " +
        (counted < 0 ? std::string("a negative count, or more than 2^63 - 1")
                     : std::to_string(counted) + ", " + std::to_string(frame.zeros) + " and " +
                           std::to_string(frame.tiny)) +
        in_channel());
  }
  static int64_t counted_in(const core::View& frame, const int64_t* counts) {
    const int32_t m = frame.layout.mantissa_bits;
    core::CountSum sum;
    for (int sign = 0; sign < 2; ++sign) {
      for (int64_t octave = 0; octave < frame.bins >> m; ++octave) {
        const int64_t* const bins =
            counts + sign * frame.layout.bins() +
            frame.layout.octave_begin(frame.bottom + static_cast<int32_t>(octave));
        for (int64_t k = 0; k < int64_t{1} << m; ++k) sum.add(bins[k]);
      }
    }
    return sum.value();
  }
  std::string in_channel() const { return " in channel " + std::to_string(channel_); }

  void store(core::Range solved) {
    const core::Range range = core::store_range(job_, channel_, solved, core::moves(job_));
    if (job_.scale == nullptr) return;
    core::store_qparams(job_, channel_,
                        rule_.given_qparams != nullptr
                            ? rule_.given_qparams(job_.grid, job_.options)
                            : core::qparams(range, job_.grid));
  }

  const SolveJob& job_;
  const RuleRow& rule_;
  const int64_t channel_;
  int64_t view_words_ = 0;
  int64_t* memory_ = nullptr;
};

// Whether `solved` is to be set: a channel had values, or with averaging_constant 0 has a range.
bool is_solved(const SolveJob& job) {
  if (job.averaging_constant == 0) {
    for (int64_t c = 0; c < job.statistic.channels; ++c)
      if (core::is_set(job, c)) return true;
    return false;
  }
  if (rules()[job.rule].needs == core::Needs::nothing) return true;
  for (int64_t c = 0; c < job.statistic.channels; ++c)
    if (job.statistic.channel(c).tally[core::kFinite] > 0) return true;
  return false;
}

}  // namespace

void solve(const SolveJob* jobs, int64_t count) {
  // The channels of all jobs are numbered in one sequence: begin[j] is the first of job j.
  std::vector<int64_t> begin(count + 1, 0);
  bool extrema_only = true;
  for (int64_t j = 0; j < count; ++j) {
    begin[j + 1] = begin[j] + jobs[j].statistic.channels;
    extrema_only = extrema_only && rules()[jobs[j].rule].needs <= core::Needs::extrema;
  }
  const int64_t channels = begin[count];
  const auto solve_row = [&](int64_t row, std::vector<int64_t>& memory, bool parallel) {
    const int64_t j = std::upper_bound(begin.begin(), begin.end(), row) - begin.begin() - 1;
    Channel(jobs[j], row - begin[j], memory).solve(parallel);
  };
  if (channels < 2 * num_threads() && !extrema_only) {
    // Too few channels to keep all threads busy: the threads share the candidates of each channel.
    std::vector<int64_t> memory;
    for (int64_t row = 0; row < channels; ++row) solve_row(row, memory, true);
  } else {
    constexpr int64_t kExtremaGrain = 4096;
    parallel_for(0, channels, extrema_only ? kExtremaGrain : 1, [&](int64_t first, int64_t last) {
      std::vector<int64_t> memory;
      for (int64_t row = first; row < last; ++row) solve_row(row, memory, false);
    });
  }
  for (int64_t j = 0; j < count; ++j)
    if (jobs[j].solved != nullptr && *jobs[j].solved == 0 && is_solved(jobs[j]))
      *jobs[j].solved = 1;
}

}  // namespace torch_ext::cpu
