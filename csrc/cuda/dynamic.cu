#include <algorithm>
#include <bit>

#include "core/qparams.h"
#include "cuda/block.h"
#include "cuda/driver.h"
#include "cuda/group.h"
#include "gpu.h"

// Fake-quant of groups of values with the scales of their own values. A short group is held by a
// few threads of a warp, a longer one by a block, which keeps it in shared memory: either reads its
// values once. Groups that are no whole bytes of the mask are looked at first and mapped then.
namespace torch_ext::cuda {
namespace {

using core::DynamicJob;
using core::FakeQuantJob;

// The least and the largest value, as keys (core/histogram.h). A NaN is beyond the infinities.
struct Extrema {
  int32_t min_key = INT32_MAX;
  int32_t max_key = INT32_MIN;

  template <class T>
  TE_GPU void add(T value) {
    const int32_t key = core::key_of(observed(value));
    min_key = key < min_key ? key : min_key;
    max_key = key > max_key ? key : max_key;
  }
};

TE_GPU int32_t larger(int32_t a, int32_t b) { return b > a ? b : a; }

// Scale and zero point of extrema. Most grids need one division, as what depends on the grid alone
// has been computed on the host.
struct ScaleOf {
  core::Grid grid;
  core::SymmetricScale symmetric;
  const float* tensor_scale;

  TE_GPU core::QParams operator()(const Extrema& extrema) const {
    const core::Range range{core::float_of_key(extrema.min_key),
                            core::float_of_key(extrema.max_key)};
    if (!grid.symmetric || tensor_scale != nullptr)
      return core::qparams(range, grid, tensor_scale == nullptr ? 0 : *tensor_scale);
    if (!core::is_valid_range(range)) return {__builtin_nanf(""), 0};
    return {symmetric(core::symmetric_bound(range, grid)), 0};
  }
};

template <class T>
TE_GPU void add(const Group<T>& in, Extrema& extrema) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) extrema.add(in.get(i));
}

template <class T, bool kDefault>
TE_GPU void map(const FakeQuantJob& job, const Group<T>& in, const core::QParams& q,
                int64_t group) {
  using C = core::compute_t<T>;
  const auto grid = core::make_unit_grid<C>(q.scale, q.zero_point, job.codes, job.rounding);
  Group<T> result{};
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    result.set(i, map_element<T, kDefault>(job, in.get(i), grid, i, bits));
  result.store(static_cast<T*>(job.out) + group * kGroup);
  if (job.mask != nullptr) job.mask[group] = static_cast<uint8_t>(bits);
}

// `lanes` threads of a warp, a power of two, hold a group, eight values each; the last of them may
// have none.
template <class T, bool kDefault>
struct ShortGroups {
  static constexpr int kThreads = 256;

  FakeQuantJob job;
  ScaleOf scale_of;
  int lanes;

  TE_GPU void operator()() const {
    const int parts = static_cast<int>(job.layout.inner) / kGroup;
    const int lane = gpu::thread() % lanes;
    const int64_t row = gpu::block() * (kThreads / lanes) + gpu::thread() / lanes;
    const bool is_inside = row < job.layout.channels && lane < parts;
    const int64_t group = row * parts + lane;
    Group<T> in{};
    Extrema extrema;
    if (is_inside) {
      in.load(static_cast<const T*>(job.x) + group * kGroup);
      add(in, extrema);
    }
    for (int away = lanes / 2; away > 0; away /= 2) {
      extrema.min_key = smaller(extrema.min_key, gpu::shuffle_xor(extrema.min_key, away));
      extrema.max_key = larger(extrema.max_key, gpu::shuffle_xor(extrema.max_key, away));
    }
    if (is_inside) map<T, kDefault>(job, in, scale_of(extrema), group);
  }
};

struct BlockMemory {
  int32_t keys[32];
  core::QParams q;
  // Behind it, aligned to 16 bytes, the groups that are kept.
};
constexpr size_t kMemory = (sizeof(BlockMemory) + 15) / 16 * 16;

// The extrema of a block's threads become the scale and the zero point of the group.
template <int kThreads>
TE_GPU core::QParams joined(Extrema extrema, const ScaleOf& scale_of, BlockMemory& memory) {
  extrema.min_key = block_fold<kThreads>(extrema.min_key, memory.keys, smaller<int32_t>);
  extrema.max_key = block_fold<kThreads>(extrema.max_key, memory.keys, larger);
  if (gpu::thread() == 0) memory.q = scale_of(extrema);
  gpu::sync();
  // The next group's is written behind barriers of block_fold().
  return memory.q;
}

// A block holds a group of whole eights. If it is not kept, it is read again.
template <class T, bool kDefault>
struct LongGroups {
  static constexpr int kThreads = 256;

  FakeQuantJob job;
  ScaleOf scale_of;
  bool keeps;

  TE_GPU void operator()() const {
    BlockMemory& memory = *static_cast<BlockMemory*>(gpu::shared());
    Group<T>* const kept = reinterpret_cast<Group<T>*>(static_cast<char*>(gpu::shared()) + kMemory);
    const int64_t groups = job.layout.inner / kGroup;
    for (int64_t row = gpu::block(); row < job.layout.channels; row += gpu::blocks()) {
      const T* const x = static_cast<const T*>(job.x) + row * job.layout.inner;
      Extrema extrema;
      for (int64_t g = gpu::thread(); g < groups; g += kThreads) {
        Group<T> in;
        in.load(x + g * kGroup);
        if (keeps) kept[g] = in;
        add(in, extrema);
      }
      const core::QParams q = joined<kThreads>(extrema, scale_of, memory);
      for (int64_t g = gpu::thread(); g < groups; g += kThreads) {
        Group<T> in;
        if (keeps)
          in = kept[g];
        else
          in.load(x + g * kGroup);
        map<T, kDefault>(job, in, q, row * groups + g);
      }
    }
  }
};

// Scales and zero points alone, of groups of any size.
template <class T>
struct Scales {
  static constexpr int kThreads = 256;

  const T* x;
  core::ChannelLayout layout;
  ScaleOf scale_of;
  float* scale;
  int32_t* zero_point;

  TE_GPU void operator()() const {
    BlockMemory& memory = *static_cast<BlockMemory*>(gpu::shared());
    for (int64_t row = gpu::block(); row < layout.channels; row += gpu::blocks()) {
      Extrema extrema;
      for (int64_t i = gpu::thread(); i < layout.inner; i += kThreads)
        extrema.add(x[row * layout.inner + i]);
      const core::QParams q = joined<kThreads>(extrema, scale_of, memory);
      if (gpu::thread() != 0) continue;
      scale[row] = q.scale;
      zero_point[row] = q.zero_point;
    }
  }
};

bool in_one_pass(const DynamicJob& job) {
  return job.group_size % kGroup == 0 && is_aligned(job.x) && is_aligned(job.out);
}

// Threads of a warp for a group of so many values; 0: it takes a block.
int lanes_of(int64_t group_size) {
  const int64_t parts = group_size / kGroup;
  return parts <= gpu::kWarp ? static_cast<int>(std::bit_ceil(static_cast<uint64_t>(parts))) : 0;
}

template <class T, bool kDefault>
void launch_one_pass(const FakeQuantJob& map, const ScaleOf& scale_of, Stream stream) {
  constexpr const char* op = "dynamic_fake_quant";
  if (const int lanes = lanes_of(map.layout.inner); lanes > 0) {
    using Kernel = ShortGroups<T, kDefault>;
    const int64_t threads = map.layout.channels * lanes;
    return gpu::launch(op, Kernel{map, scale_of, lanes},
                       {(threads + Kernel::kThreads - 1) / Kernel::kThreads}, stream);
  }
  using Kernel = LongGroups<T, kDefault>;
  const size_t row = kMemory + map.layout.inner * sizeof(T);
  const bool keeps = static_cast<int64_t>(row) <= gpu::device().shared_memory;
  const size_t shared = keeps ? row : kMemory;
  const int64_t blocks = std::min(map.layout.channels, gpu::resident_blocks<Kernel>(shared));
  gpu::launch(op, Kernel{map, scale_of, keeps}, {blocks, shared}, stream);
}

}  // namespace

size_t dynamic_scratch(const DynamicJob& job) {
  return in_one_pass(job) ? 0 : job.groups * (sizeof(float) + sizeof(int32_t));
}

void dynamic_fake_quant(core::DType dtype, const DynamicJob& job, void* scratch, Stream stream) {
  const ScaleOf scale_of{job.grid, core::SymmetricScale(job.grid), job.tensor_scale};
  if (in_one_pass(job)) {
    const FakeQuantJob map = core::with_scales(job, nullptr, nullptr);
    return with_type(dtype, [&]<class T>() {
      if (is_default(map))
        launch_one_pass<T, true>(map, scale_of, stream);
      else
        launch_one_pass<T, false>(map, scale_of, stream);
    });
  }
  float* const scale = static_cast<float*>(scratch);
  int32_t* const zero_point = static_cast<int32_t*>(scratch) + job.groups;
  with_type(dtype, [&]<class T>() {
    using Kernel = Scales<T>;
    const int64_t blocks = std::min(job.groups, gpu::resident_blocks<Kernel>(kMemory));
    gpu::launch("dynamic_fake_quant",
                Kernel{static_cast<const T*>(job.x),
                       {1, job.groups, job.group_size},
                       scale_of,
                       scale,
                       zero_point},
                {blocks, kMemory}, stream);
  });
  fake_quant_forward(dtype, core::with_scales(job, scale, zero_point), stream);
}

}  // namespace torch_ext::cuda
