#include "cpu/map.h"

#include <algorithm>
#include <memory>
#include <numeric>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace torch_ext::cpu {
namespace {

// The least number of blocks for a thread.
constexpr int64_t kGrain = (1 << 15) / kMapBlock;

// body(begin, end) over elements [0, numel), cut at multiples of kMapBlock.
template <class Body>
void for_each_block(int64_t numel, const Body& body) {
  const int64_t blocks = (numel + kMapBlock - 1) / kMapBlock;
  parallel_for(0, blocks, kGrain, [&](int64_t first, int64_t last) {
    body(first * kMapBlock, std::min(last * kMapBlock, numel));
  });
}

// Memory for the grids of so many channels.
std::unique_ptr<char[]> grid_memory(core::DType dtype, int64_t channels) {
  const int64_t size = dtype == core::DType::f64 ? sizeof(double) : sizeof(float);
  return std::unique_ptr<char[]>(new char[4 * (channels + kGridPadding) * size]);
}

// Fewer rows of a channel are staged each time anew.
constexpr int64_t kManyRows = 4;

// From this size on the output does not stay in a cache until it is read again, so it is written
// past the caches: its lines need not be read first. For smaller outputs plain stores are faster.
constexpr int64_t kStreamBytes = 16 << 20;

}  // namespace

int64_t size_of(core::DType dtype) {
  return dtype == core::DType::f64 ? 8 : dtype == core::DType::f32 ? 4 : 2;
}

bool streams(core::DType dtype, int64_t numel, const void* out) {
  return numel * size_of(dtype) >= kStreamBytes && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

int64_t rows_in_lines(int64_t bytes) {
  constexpr int64_t kLine = 64;
  return kLine / std::gcd(kLine, bytes);
}

void fake_quant_forward(core::DType dtype, const core::FakeQuantJob& job) {
  fake_quant_part(dtype, job, streams(dtype, job.layout.numel(), job.out));
}

void fake_quant_part(core::DType dtype, const core::FakeQuantJob& job, bool stream) {
  MapTask task{job, stream};
  const MapKernels& k = kernels().map;
  const MapKernels::Forward forward = k.forward[static_cast<int>(dtype)];
  const int64_t channels = job.layout.channels;
  std::unique_ptr<char[]> grids;
  if (channels > kGridTile && job.layout.outer >= kManyRows) {
    grids = grid_memory(dtype, channels);
    parallel_for(0, channels + kGridPadding, kGrain * kMapBlock, [&](int64_t first, int64_t last) {
      k.stage[static_cast<int>(dtype)](job, first, last - first, 0, channels, grids.get());
    });
    task.grids = grids.get();
  }
  for_each_block(job.layout.numel(),
                 [&](int64_t begin, int64_t end) { forward(task, begin, end); });
}

void fake_quant_backward(core::DType dtype, const void* grad, const uint8_t* mask, void* dx,
                         int64_t numel) {
  const MapKernels::Backward backward = kernels().map.backward[static_cast<int>(dtype)];
  const bool stream = streams(dtype, numel, dx);
  for_each_block(numel,
                 [&](int64_t begin, int64_t end) { backward(grad, mask, dx, begin, end, stream); });
}

}  // namespace torch_ext::cpu
