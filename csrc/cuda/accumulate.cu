#include <algorithm>

#include "cuda/observe.h"

// Plans the launch of observe.h: how the tensor is cut into items, and which counters the kernel
// uses.
namespace torch_ext::cuda {
namespace {

using core::HistogramLayout;

struct Plan {
  Cut cut;
  int64_t blocks;
  size_t shared_memory;
  size_t partial_bytes;  // of scratch, a multiple of 16
  size_t table_bytes;    // of scratch
};

// The least number of values for a block.
constexpr int64_t kPerBlock = 1 << 15;

bool is_packed(const TensorView& x, int32_t ch_axis, const core::Walk& walk, int64_t per_packet) {
  if (!is_aligned(x.data) || walk.dims[0].stride != 1) return false;
  if (ch_axis >= 0 && x.sizes[ch_axis] > 1 && x.strides[ch_axis] % per_packet != 0) return false;
  if (walk.count == 1) return true;
  if (walk.dims[0].size % per_packet != 0) return false;
  for (int32_t d = 1; d < walk.count; ++d)
    if (walk.dims[d].stride % per_packet != 0) return false;
  return true;
}

// Channels of a group: where adjacent channels are adjacent in memory, up to a warp's worth of
// them; else 1.
int32_t group_channels_of(const core::Walk& walk, int64_t channel_stride, const Statistic& into) {
  if (into.channels == 1 || channel_stride != 1 || walk.dims[0].stride <= 1) return 1;
  int32_t channels = 1;
  while (channels < kMaxGroupChannels && channels < into.channels) channels *= 2;
  return channels;
}

// Bytes per bin of the counters in shared memory: 4 or 2, or 0 where not even those of one channel
// fit.
int64_t table_width(HistogramLayout layout, int32_t wanted) {
  const int64_t memory = gpu::device().shared_memory - static_cast<int64_t>(sizeof(BlockState));
  const int64_t wide = memory / (WideTable::kSharedBytes * layout.size());
  if (wide >= std::min(wanted, 8)) return WideTable::kSharedBytes;
  if (memory >= NarrowTable::kSharedBytes * layout.size()) return NarrowTable::kSharedBytes;
  return 0;
}

template <class T, class Table>
Plan make_plan(const TensorView& x, int32_t ch_axis, const Statistic& into, int64_t width) {
  Plan plan{};
  Cut& cut = plan.cut;
  cut.walk = core::walk_of(x, ch_axis);
  cut.values = cut.walk.values();
  cut.channel_stride = ch_axis < 0 ? 0 : x.strides[ch_axis];
  cut.group_channels = group_channels_of(cut.walk, cut.channel_stride, into);
  if (is_packed(x, ch_axis, cut.walk, kPerPacket<T>)) {
    cut.per_unit = kPerPacket<T>;
    cut.walk.dims[0] = {(cut.walk.dims[0].size + cut.per_unit - 1) / cut.per_unit, cut.per_unit};
  } else {
    cut.per_unit = 1;
  }
  cut.units = cut.walk.values();
  cut.whole = cut.values / cut.per_unit;
  plan.shared_memory = sizeof(BlockState);
  if constexpr (kCounts<Table>) {
    const int64_t memory = gpu::device().shared_memory - static_cast<int64_t>(sizeof(BlockState));
    const int64_t size = into.layout.size();
    while (cut.group_channels > 1 &&
           cut.group_channels * size * std::max<int64_t>(width, 2) > memory)
      cut.group_channels /= 2;
    plan.shared_memory += cut.group_channels * size * width;
  }
  cut.groups = (into.channels + cut.group_channels - 1) / cut.group_channels;
  const int64_t resident = gpu::resident_blocks<Observe<T, Table>>(plan.shared_memory);
  const int64_t worth = cut.values * cut.group_channels / kPerBlock;
  cut.splits = std::clamp<int64_t>(std::min(worth, resident / std::max<int64_t>(1, cut.groups)), 1,
                                   std::max<int64_t>(1, cut.units));
  plan.blocks = cut.splits > 1 ? cut.groups * cut.splits : std::min(cut.groups, resident);
  if (cut.splits > 1) {
    plan.partial_bytes = plan.blocks * cut.group_channels * sizeof(Partial);
    plan.partial_bytes = (plan.partial_bytes + 15) / 16 * 16;
  }
  if (kCounts<Table> && width != WideTable::kSharedBytes)
    plan.table_bytes = plan.blocks * cut.group_channels * into.layout.size() * sizeof(uint32_t);
  return plan;
}

template <class T, class Use>
void with_table(const TensorView& x, int32_t ch_axis, const Statistic& into, const Use& use) {
  if (into.layout.octaves == 0)
    return use.template operator()<T, NoTable>(make_plan<T, NoTable>(x, ch_axis, into, 0));
  const core::Walk walk = core::walk_of(x, ch_axis);
  const int64_t stride = ch_axis < 0 ? 0 : x.strides[ch_axis];
  const int64_t width = table_width(into.layout, group_channels_of(walk, stride, into));
  if (width == NarrowTable::kSharedBytes)
    return use.template operator()<T, NarrowTable>(
        make_plan<T, NarrowTable>(x, ch_axis, into, width));
  return use.template operator()<T, WideTable>(make_plan<T, WideTable>(x, ch_axis, into, width));
}

// Calls use<T, Table>(plan) for this tensor and statistic.
template <class Use>
void with_plan(const TensorView& x, int32_t ch_axis, const Statistic& into, const Use& use) {
  switch (x.dtype) {
    case core::DType::f64:
      return with_table<double>(x, ch_axis, into, use);
    case core::DType::f16:
      return with_table<core::half>(x, ch_axis, into, use);
    case core::DType::bf16:
      return with_table<core::bfloat16>(x, ch_axis, into, use);
    default:
      return with_table<float>(x, ch_axis, into, use);
  }
}

}  // namespace

size_t observe_scratch(const TensorView& x, int32_t ch_axis, const Statistic& into) {
  size_t bytes = 0;
  with_plan(x, ch_axis, into, [&]<class T, class Table>(const Plan& plan) {
    bytes = plan.partial_bytes + plan.table_bytes;
  });
  return bytes;
}

void observe(const TensorView& x, int32_t ch_axis, const Statistic& into, ObserveMode mode,
             void* scratch, Stream stream) {
  with_plan(x, ch_axis, into, [&]<class T, class Table>(const Plan& plan) {
    char* const memory = static_cast<char*>(scratch);
    const Observe<T, Table> kernel{
        static_cast<const T*>(x.data),
        plan.cut,
        into,
        mode,
        plan.partial_bytes == 0 ? nullptr : reinterpret_cast<Partial*>(memory),
        plan.table_bytes == 0 ? nullptr : reinterpret_cast<uint32_t*>(memory + plan.partial_bytes)};
    gpu::launch("observe_", kernel, {plan.blocks, plan.shared_memory, plan.cut.splits > 1}, stream);
  });
}

}  // namespace torch_ext::cuda
