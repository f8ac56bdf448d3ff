#include "cpu/map.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace torch_ext::cpu {
namespace {

// Blocks that are worth waking a thread for.
constexpr int64_t kGrain = (1 << 15) / kMapBlock;

// body(begin, end) over elements [0, numel), cut at multiples of kMapBlock.
template <class Body>
void for_each_block(int64_t numel, const Body& body) {
  const int64_t blocks = (numel + kMapBlock - 1) / kMapBlock;
  parallel_for(0, blocks, kGrain, [&](int64_t first, int64_t last) {
    body(first * kMapBlock, std::min(last * kMapBlock, numel));
  });
}

}  // namespace

void fake_quant_forward(core::DType dtype, const void* x, void* out, uint8_t* mask,
                        const ChannelLayout& layout, const float* scale, const int32_t* zero_point,
                        int32_t quant_min, int32_t quant_max, core::Rounding rounding,
                        core::Mask mask_kind) {
  const MapTask task{x,          out,       mask,      layout,   scale,
                     zero_point, quant_min, quant_max, rounding, mask_kind};
  const MapKernels::Forward forward = kernels().map.forward[static_cast<int>(dtype)];
  for_each_block(layout.numel(), [&](int64_t begin, int64_t end) { forward(task, begin, end); });
}

void fake_quant_backward(core::DType dtype, const void* grad, const uint8_t* mask, void* dx,
                         int64_t numel) {
  const MapKernels::Backward backward = kernels().map.backward[static_cast<int>(dtype)];
  for_each_block(numel, [&](int64_t begin, int64_t end) { backward(grad, mask, dx, begin, end); });
}

}  // namespace torch_ext::cpu
