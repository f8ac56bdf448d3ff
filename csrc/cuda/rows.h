#pragma once

#include <algorithm>
#include <cstdint>

#include "core/solution.h"
#include "gpu.h"
#include "registry.h"

// A row is a channel of a job. This file has the steps that do not depend on what its rule reads.
namespace torch_ext::cuda {

template <class List>
struct MaxOptions;
template <class... R>
struct MaxOptions<List<R...>> {
  static constexpr int value = std::max({R::option_count...});
};

// A job, as passed in a kernel's arguments.
struct Task {
  core::SolveJob job;  // job.options is null, its options are below
  double options[MaxOptions<Observers>::value];
  core::Needs needs;
  int64_t end;  // rows of this and all tasks before it
};

// Calls f.template operator()<Rule>() for the rule with this index.
template <class F>
TE_GPU void with_rule(int32_t rule, const F& f) {
  Observers::for_each([&]<class R>(int32_t index) {
    if (index == rule) f.template operator()<R>();
  });
}

struct Row {
  const Task& task;
  int64_t channel;

  TE_GPU core::ChannelStatistic statistic() const { return task.job.statistic.channel(channel); }
  // Whether the range stays as it is (averaging_constant 0). If it is solved, nothing was observed.
  TE_GPU bool is_frozen() const {
    return core::is_set(task.job, channel) ||
           (task.job.solved != nullptr && *task.job.solved != 0 &&
            task.job.averaging_constant == 0);
  }
  // Whether `solved` is to be set: the channel had values, or with averaging_constant 0 has a
  // range.
  TE_GPU bool is_solved() const {
    return task.job.averaging_constant == 0 ? core::is_set(task.job, channel) : has_values();
  }
  TE_GPU bool has_values() const {
    return task.needs == core::Needs::nothing || statistic().tally[core::kFinite] != 0;
  }
};
TE_GPU void store(const Row& row, core::Range solved) {
  const core::SolveJob& job = row.task.job;
  const core::Range range = core::store_range(job, row.channel, solved, core::moves(job));
  if (job.scale == nullptr) return;
  core::QParams q = core::qparams(range, job.grid);
  with_rule(job.rule, [&]<class R>() {
    if constexpr (core::GivesQParams<R>) q = R::qparams(job.grid, row.task.options);
  });
  core::store_qparams(job, row.channel, q);
}
// Handles frozen rows and channels without values: a range that follows stays, any other becomes
// (0, 0). Returns whether the row is done.
TE_GPU bool store_if_empty(const Row& row) {
  if (row.is_frozen()) return true;
  if (row.has_values()) return false;
  if (row.task.job.solved == nullptr) store(row, {0, 0});
  return true;
}
TE_GPU core::Range nan_range() {
  return {static_cast<double>(__builtin_nanf("")), static_cast<double>(__builtin_nanf(""))};
}
// Solves a row whose rule reads nothing but extrema, in one thread.
TE_GPU void solve_extrema(const Row& row) {
  if (store_if_empty(row)) return;
  const Task& task = row.task;
  core::View view{};
  core::Range range{0, 0};
  if (task.needs == core::Needs::extrema) {
    const core::ChannelStatistic s = row.statistic();
    if (!core::has_extrema(s) || !core::has_tally(s)) return store(row, nan_range());
    view = core::frame_view(task.job.statistic.layout, task.needs, s.extrema, s.tally, nullptr,
                            nullptr);
  }
  with_rule(task.job.rule, [&]<class R>() {
    if constexpr (core::ClosedRule<R> && R::needs <= core::Needs::extrema)
      range = R::solve(view, task.job.grid, task.options);
  });
  store(row, range);
}

// Copies a job and its options into a task, for a kernel's arguments.
inline Task task_of(const core::SolveJob& job, core::Needs needs, int32_t option_count) {
  Task task{};
  task.job = job;
  task.job.options = nullptr;
  for (int32_t i = 0; i < option_count; ++i) task.options[i] = job.options[i];
  task.needs = needs;
  return task;
}

}  // namespace torch_ext::cuda
