#include <algorithm>

#include "cuda/accumulator.h"
#include "cuda/driver.h"
#include "cuda/group.h"
#include "cuda/rows.h"
#include "gpu.h"
#include "rule_table.h"

// Observe, follow and fake-quantize rows that fit in shared memory, in one pass over memory: a
// block reads a row into shared memory, moves the row's range, and writes the row quantized with
// it.
namespace torch_ext::cuda {
namespace {

using core::FakeQuantJob;
using core::Needs;

template <class T, bool kDefault>
struct Follow {
  static constexpr int kThreads = 256;
  using C = core::compute_t<T>;

  Task task;
  FakeQuantJob map;

  TE_GPU void operator()() const {
    BlockState& state = *static_cast<BlockState*>(gpu::shared());
    Accumulator<NoTable, kThreads, kGroup> block(state, {}, {}, 1);
    bool solved = false;
    for (int64_t c = gpu::block(); c < map.layout.channels; c += gpu::blocks()) {
      const Row row{task, c};
      const bool frozen = row.is_frozen();
      observe(block, c);
      if (gpu::thread() == 0 && !frozen) {
        write(row.statistic(), state.totals[0]);
        solve_extrema(row);
      }
      if (gpu::thread() == 0) solved = solved || row.is_solved();
      gpu::sync();
      quantize(c);
      gpu::sync();
    }
    // Every row has read the flag; now it may be set.
    gpu::sync_blocks();
    if (solved && *task.job.solved == 0) *task.job.solved = 1;
  }

 private:
  TE_GPU int64_t groups() const { return map.layout.inner / kGroup; }
  TE_GPU Group<T>* kept() const {
    return reinterpret_cast<Group<T>*>(static_cast<BlockState*>(gpu::shared()) + 1);
  }

  template <class Block>
  TE_GPU void observe(Block& block, int64_t c) const {
    block.start([](int) { return 0; });
    const T* const x = static_cast<const T*>(map.x) + c * map.layout.inner;
    for (int64_t g = gpu::thread(); g < groups(); g += kThreads) {
      Group<T> in;
      in.load(x + g * kGroup);
      kept()[g] = in;
      float values[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) values[i] = observed(in.get(i));
      block.add(values, 0);
    }
    block.finish();
  }

  TE_GPU static void write(const core::ChannelStatistic& to, const Partial& total) {
    to.extrema[0] = core::positive_zero(core::float_of_key(total.min_key));
    to.extrema[1] = core::positive_zero(core::float_of_key(total.max_key));
    for (int column = 0; column < core::kTallyColumns; ++column)
      to.tally[column] = total.tally[column];
  }

  // Each thread reads back from shared memory the groups that it stored there itself.
  TE_GPU void quantize(int64_t c) const {
    const core::UnitGrid<C> grid =
        core::make_unit_grid<C>(map.scale[c], map.zero_point[c], map.codes, map.rounding);
    T* const out = static_cast<T*>(map.out) + c * map.layout.inner;
    uint8_t* const mask = map.mask == nullptr ? nullptr : map.mask + c * groups();
    for (int64_t g = gpu::thread(); g < groups(); g += kThreads) {
      const Group<T> in = kept()[g];
      Group<T> result{};
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        result.set(i, map_element<T, kDefault>(map, in.get(i), grid, i, bits));
      result.store(out + g * kGroup);
      if (mask != nullptr) mask[g] = static_cast<uint8_t>(bits);
    }
  }
};

size_t row_bytes(core::DType dtype, const FakeQuantJob& map) {
  const size_t width = dtype == core::DType::f64 ? 8 : dtype == core::DType::f32 ? 4 : 2;
  return map.layout.inner * width;
}

}  // namespace

bool follows_on_chip(int32_t rule, core::DType dtype, const FakeQuantJob& map) {
  // With fewer rows than kManyRows most of a device would be idle, which matters from kFewValues
  // values on.
  constexpr int64_t kManyRows = 32, kFewValues = 1 << 16;
  const core::ChannelLayout& layout = map.layout;
  return rules()[rule].needs == Needs::extrema && layout.outer == 1 && layout.inner > 0 &&
         layout.inner % kGroup == 0 && is_aligned(map.x) && is_aligned(map.out) &&
         (layout.channels >= kManyRows || layout.numel() <= kFewValues) &&
         static_cast<int64_t>(sizeof(BlockState) + row_bytes(dtype, map)) <=
             gpu::device().shared_memory;
}

void follow_on_chip(const SolveJob& job, core::DType dtype, const FakeQuantJob& map,
                    Stream stream) {
  const RuleRow& rule = rules()[job.rule];
  const Task task = task_of(job, rule.needs, static_cast<int32_t>(rule.options.size()));
  const size_t shared = sizeof(BlockState) + row_bytes(dtype, map);
  with_type(dtype, [&]<class T>() {
    const auto start = [&]<bool kDefault>() {
      using Kernel = Follow<T, kDefault>;
      const int64_t blocks = std::min(map.layout.channels, gpu::resident_blocks<Kernel>(shared));
      gpu::launch("follow_fake_quant", Kernel{task, map}, {blocks, shared, true}, stream);
    };
    if (is_default(map))
      start.template operator()<true>();
    else
      start.template operator()<false>();
  });
}

}  // namespace torch_ext::cuda
