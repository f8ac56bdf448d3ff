#include <algorithm>
#include <vector>

#include "cuda/driver.h"
#include "cuda/steps.h"
#include "rule_table.h"

// Jobs as arguments of a kernel (steps.h), and the memory it needs.
namespace torch_ext::cuda {
namespace {

using core::Needs;

// Jobs of one launch; their list travels in its arguments.
template <int kMost>
struct Solve {
  static constexpr int kThreads = kSolveThreads;
  Steps steps;
  Task tasks[kMost];

  TE_GPU void operator()() const {
    Steps own = steps;
    own.tasks = tasks;
    gpu::apart(own);
  }
};
constexpr int kMostTasks = 128;
constexpr int64_t kMostWords = (int64_t{256} << 20) / 8;

RowLayout layout_of(const std::vector<const SolveJob*>& jobs) {
  int64_t view = 0, work = 0, objectives = 0;
  for (const SolveJob* job : jobs) {
    const core::HistogramLayout layout = job->statistic.layout;
    view = std::max(view, core::view_words(layout, rules()[job->rule].needs));
    work = std::max(work, work_words(job->rule, layout, job->grid, job->options));
    if (rules()[job->rule].most_candidates != nullptr)
      objectives = std::max(objectives, rules()[job->rule].most_candidates(layout));
  }
  RowLayout found{};
  found.work = view;
  found.objectives = found.work + work;
  found.state = (found.objectives + objectives + 1) / 2 * 2;
  found.stride = found.state + static_cast<int64_t>((sizeof(RowState) + 15) / 16 * 2);
  found.groups = (objectives + gpu::kWarp - 1) / gpu::kWarp;
  return found;
}

bool is_cheap(const SolveJob& job) { return rules()[job.rule].needs <= Needs::extrema; }

// Those that read a histogram, of which a launch has `wave` rows in memory at a time.
struct Heavy {
  RowLayout layout;
  int64_t rows = 0;
  int64_t wave = 0;
};
Heavy heavy_of(const SolveJob* jobs, int64_t count) {
  std::vector<const SolveJob*> heavy;
  Heavy found{};
  for (int64_t j = 0; j < count; ++j) {
    if (is_cheap(jobs[j])) continue;
    heavy.push_back(&jobs[j]);
    found.rows += jobs[j].statistic.channels;
  }
  if (found.rows == 0) return found;
  found.layout = layout_of(heavy);
  found.wave = std::clamp<int64_t>(kMostWords / found.layout.stride, 1, found.rows);
  return found;
}

template <int kMost>
void launch(const std::vector<const SolveJob*>& jobs, const Heavy& heavy, void* scratch,
            Stream stream) {
  Solve<kMost> kernel{};
  Steps& steps = kernel.steps;
  steps.count = static_cast<int32_t>(jobs.size());
  steps.wave = std::max<int64_t>(1, heavy.wave);
  steps.layout = heavy.layout;
  steps.memory = static_cast<int64_t*>(scratch);
  for (int32_t t = 0; t < steps.count; ++t) {
    const RuleRow& rule = rules()[jobs[t]->rule];
    Task& task = kernel.tasks[t];
    task = task_of(*jobs[t], rule.needs, static_cast<int32_t>(rule.options.size()));
    steps.rows += task.job.statistic.channels;
    task.end = steps.rows;
    if (is_cheap(*jobs[t])) steps.cheap = steps.rows;
  }
  constexpr size_t kShared = kSolveWarps * sizeof(double);
  // A row's candidates are some fifty warps' work.
  const int64_t wanted = std::max((steps.cheap + kSolveThreads - 1) / kSolveThreads,
                                  64 * std::min(steps.rows - steps.cheap, steps.wave));
  const int64_t blocks =
      std::clamp<int64_t>(wanted, 1, gpu::resident_blocks<Solve<kMost>>(kShared));
  gpu::launch("solve", kernel, {blocks, kShared, true}, stream);
}

struct QParamsOf {
  static constexpr int kThreads = 256;
  const float* range;
  int64_t channels;
  core::Grid grid;
  float* scale;
  int32_t* zero_point;

  TE_GPU void operator()() const {
    const int64_t c = gpu::block() * kThreads + gpu::thread();
    if (c >= channels) return;
    const core::QParams q = core::qparams({range[2 * c], range[2 * c + 1]}, grid);
    scale[c] = q.scale;
    zero_point[c] = q.zero_point;
  }
};

}  // namespace

size_t solve_scratch(const SolveJob* jobs, int64_t count) {
  const Heavy heavy = heavy_of(jobs, count);
  return heavy.wave * heavy.layout.stride * sizeof(int64_t);
}

void solve(const SolveJob* jobs, int64_t count, void* scratch, Stream stream) {
  const Heavy heavy = heavy_of(jobs, count);
  for (int64_t begin = 0; begin < count; begin += kMostTasks) {
    std::vector<const SolveJob*> some;
    for (int64_t j = begin; j < std::min<int64_t>(begin + kMostTasks, count); ++j)
      some.push_back(&jobs[j]);
    std::stable_partition(some.begin(), some.end(), [](const SolveJob* j) { return is_cheap(*j); });
    if (some.size() == 1)
      launch<1>(some, heavy, scratch, stream);
    else
      launch<kMostTasks>(some, heavy, scratch, stream);
  }
}

void qparams(const float* range, int64_t channels, const core::Grid& grid, float* scale,
             int32_t* zero_point, Stream stream) {
  gpu::launch("qparams", QParamsOf{range, channels, grid, scale, zero_point},
              {(channels + QParamsOf::kThreads - 1) / QParamsOf::kThreads}, stream);
}

}  // namespace torch_ext::cuda
