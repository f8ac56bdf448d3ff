#include "cpu/gptq.h"

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace torch_ext::cpu {

void gptq(core::DType dtype, const GptqJob& job) {
  if (job.rows == 0 || job.inputs == 0) return;
  const GptqKernels& k = kernels().gptq;
  const auto round_rows = dtype == core::DType::f64 ? k.rows_f64 : k.rows_f32;
  const int64_t tiles = (job.rows + kGptqRows - 1) / kGptqRows;
  // Additions and multiplications of a tile; a thread is worth some ten thousand of them.
  const int64_t cost = std::min(job.rows, kGptqRows) * job.inputs * job.inputs;
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / cost);
  parallel_for(0, job.groups * tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> work(std::min(job.rows, kGptqRows) * job.inputs);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile % tiles * kGptqRows;
      const int64_t count = std::min(job.rows - first, kGptqRows);
      round_rows(job, tile / tiles, first, count, work.data());
    }
  });
}

}  // namespace torch_ext::cpu
