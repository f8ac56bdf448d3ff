#include <algorithm>
#include <vector>

#include "cuda/driver.h"
#include "cuda/steps.h"
#include "rule_table.h"

// Passes jobs to the kernel of steps.h, and computes how much memory it needs.
namespace torch_ext::cuda {
namespace {

using core::Needs;

// The kernel. The list of jobs is passed in its arguments.
template <int kTasks>
struct Solve {
  static constexpr int kThreads = kSolveThreads;
  Steps steps;
  Task tasks[kTasks];

  TE_GPU void operator()() const {
    Steps own = steps;
    own.tasks = tasks;
    gpu::call_noinline(own);
  }
};
constexpr int kMaxTasks = 128;
constexpr int64_t kMaxWords = (int64_t{256} << 20) / 8;

RowLayout layout_of(const std::vector<const SolveJob*>& jobs) {
  int64_t view = 0, work = 0, objectives = 0;
  for (const SolveJob* job : jobs) {
    const core::HistogramLayout layout = job->statistic.layout;
    view = std::max(view, core::view_words(layout, rules()[job->rule].needs));
    work = std::max(work, work_words(job->rule, layout, job->grid, job->options));
    if (rules()[job->rule].max_candidates != nullptr)
      objectives = std::max(objectives, rules()[job->rule].max_candidates(layout));
  }
  RowLayout row{};
  row.work = view;
  row.objectives = row.work + work;
  row.state = (row.objectives + objectives + 1) / 2 * 2;
  row.stride = row.state + static_cast<int64_t>((sizeof(RowState) + 15) / 16 * 2);
  row.groups = (objectives + gpu::kWarp - 1) / gpu::kWarp;
  return row;
}

bool reads_no_histogram(const SolveJob& job) { return rules()[job.rule].needs <= Needs::extrema; }

// The rows of jobs that read a histogram. A launch has memory for `wave` of them at a time.
struct HistogramRows {
  RowLayout layout;
  int64_t rows = 0;
  int64_t wave = 0;
};
HistogramRows histogram_rows_of(const SolveJob* jobs, int64_t count) {
  std::vector<const SolveJob*> histogram_jobs;
  HistogramRows result{};
  for (int64_t j = 0; j < count; ++j) {
    if (reads_no_histogram(jobs[j])) continue;
    histogram_jobs.push_back(&jobs[j]);
    result.rows += jobs[j].statistic.channels;
  }
  if (result.rows == 0) return result;
  result.layout = layout_of(histogram_jobs);
  result.wave = std::clamp<int64_t>(kMaxWords / result.layout.stride, 1, result.rows);
  return result;
}

template <int kTasks>
void launch(const std::vector<const SolveJob*>& jobs, const HistogramRows& histograms,
            void* scratch, Stream stream) {
  Solve<kTasks> kernel{};
  Steps& steps = kernel.steps;
  steps.count = static_cast<int32_t>(jobs.size());
  steps.wave = std::max<int64_t>(1, histograms.wave);
  steps.layout = histograms.layout;
  steps.memory = static_cast<int64_t*>(scratch);
  for (int32_t t = 0; t < steps.count; ++t) {
    const RuleRow& rule = rules()[jobs[t]->rule];
    Task& task = kernel.tasks[t];
    task = task_of(*jobs[t], rule.needs, static_cast<int32_t>(rule.options.size()));
    steps.rows += task.job.statistic.channels;
    task.end = steps.rows;
    if (reads_no_histogram(*jobs[t])) steps.extrema_rows = steps.rows;
  }
  constexpr size_t kShared = kSolveWarps * sizeof(double);
  // The candidates of a row keep about fifty warps busy.
  const int64_t wanted = std::max((steps.extrema_rows + kSolveThreads - 1) / kSolveThreads,
                                  64 * std::min(steps.rows - steps.extrema_rows, steps.wave));
  const int64_t blocks =
      std::clamp<int64_t>(wanted, 1, gpu::resident_blocks<Solve<kTasks>>(kShared));
  gpu::launch("solve", kernel, {blocks, kShared, true}, stream);
}

struct QParamsOf {
  static constexpr int kThreads = 256;
  const float* range;
  int64_t channels;
  core::Grid grid;
  const float* tensor_scale;
  float* scale;
  int32_t* zero_point;

  TE_GPU void operator()() const {
    const int64_t c = gpu::block() * kThreads + gpu::thread();
    if (c >= channels) return;
    const core::QParams q = core::qparams({range[2 * c], range[2 * c + 1]}, grid,
                                          tensor_scale == nullptr ? 0 : *tensor_scale);
    scale[c] = q.scale;
    zero_point[c] = q.zero_point;
  }
};

}  // namespace

size_t solve_scratch(const SolveJob* jobs, int64_t count) {
  const HistogramRows histograms = histogram_rows_of(jobs, count);
  return histograms.wave * histograms.layout.stride * sizeof(int64_t);
}

void solve(const SolveJob* jobs, int64_t count, void* scratch, Stream stream) {
  const HistogramRows histograms = histogram_rows_of(jobs, count);
  for (int64_t begin = 0; begin < count; begin += kMaxTasks) {
    std::vector<const SolveJob*> batch;
    for (int64_t j = begin; j < std::min<int64_t>(begin + kMaxTasks, count); ++j)
      batch.push_back(&jobs[j]);
    std::stable_partition(batch.begin(), batch.end(),
                          [](const SolveJob* j) { return reads_no_histogram(*j); });
    if (batch.size() == 1)
      launch<1>(batch, histograms, scratch, stream);
    else
      launch<kMaxTasks>(batch, histograms, scratch, stream);
  }
}

void qparams(const float* range, int64_t channels, const core::Grid& grid,
             const float* tensor_scale, float* scale, int32_t* zero_point, Stream stream) {
  gpu::launch("qparams", QParamsOf{range, channels, grid, tensor_scale, scale, zero_point},
              {(channels + QParamsOf::kThreads - 1) / QParamsOf::kThreads}, stream);
}

}  // namespace torch_ext::cuda
