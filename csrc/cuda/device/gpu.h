#pragma once

#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/half.h"
#include "cuda/errors.h"

// The functions of CUDA that the kernels use, and the launch of a kernel. A kernel is a struct with
// kThreads, the number of threads of a block, and operator(), which one thread runs. The tests have
// another file of this name, which runs the same kernels on the host, one thread at a time, in
// random order.
#define TE_GPU __device__ __forceinline__

namespace torch_ext::gpu {

using Stream = struct CUstream_st*;

// Index of this thread in its block, index of the block, number of blocks.
TE_GPU int thread() { return static_cast<int>(threadIdx.x); }
TE_GPU int64_t block() { return blockIdx.x; }
TE_GPU int64_t blocks() { return gridDim.x; }
constexpr int kWarp = 32;

// The block's dynamic shared memory, aligned to 16 bytes. Its size is in the Launch.
extern __shared__ int4 dynamic_shared_memory[];
TE_GPU void* shared() { return dynamic_shared_memory; }

// Barrier of all threads of the block; makes their writes visible to each other.
TE_GPU void sync() { __syncthreads(); }
TE_GPU bool sync_or(bool value) { return __syncthreads_or(value) != 0; }
// Barrier of all blocks; only in a cooperative launch.
TE_GPU void sync_blocks() { cooperative_groups::this_grid().sync(); }

// The value of the lane whose number is this lane's xor `lanes`. All lanes of a warp have to call
// it.
template <class T>
TE_GPU T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// Atomics, on shared or global memory.
TE_GPU void add(uint32_t* to, uint32_t value) { atomicAdd(to, value); }
TE_GPU uint32_t fetch_add(uint32_t* to, uint32_t value) { return atomicAdd(to, value); }
TE_GPU void add(int64_t* to, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
TE_GPU void lower(int32_t* to, int32_t value) { atomicMin(to, value); }
TE_GPU void raise(int32_t* to, int32_t value) { atomicMax(to, value); }

// 16 bytes, loaded and stored in one access; the address has to be a multiple of 16.
struct alignas(16) Packet {
  uint32_t words[4];
};
TE_GPU Packet load(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
TE_GPU void store(void* to, const Packet& p) {
  *static_cast<uint4*>(to) = make_uint4(p.words[0], p.words[1], p.words[2], p.words[3]);
}

// Exact conversion, in one instruction.
TE_GPU float widen(core::half x) { return __half2float(__ushort_as_half(x.bits)); }

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // Clears the error, which the next caller of cudaGetLastError() would take for its own. Errors of
  // a broken device are sticky and remain.
  cudaGetLastError();
  const std::string text = std::string("CUDA: ") + what + ": " + cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation) throw cuda::OutOfMemory(text);
  throw std::runtime_error(text);
}

// f(arguments) as a call that is not inlined, for long code that runs rarely or that several
// kernels share.
template <class F, class... A>
__device__ __noinline__ auto call_noinline(const F& f, A... arguments) {
  return f(arguments...);
}

struct Device {
  int index;
  int processors;
  int64_t shared_memory;  // most that a block can have, in bytes
};

// The current device.
inline Device device() {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int index = 0;
  check(cudaGetDevice(&index), "finding the current device");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto entry = known.find(index);
  if (entry != known.end()) return entry->second;
  int processors = 0, shared_memory = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index),
        "reading the number of multiprocessors");
  check(cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
        "reading the shared memory of a block");
  return known[index] = {index, processors, shared_memory};
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1) run(const __grid_constant__ Kernel kernel) {
  kernel();
}

// Lets a block of this kernel have all the shared memory that the current device gives to one: once
// for each kernel and device, and always the same limit. A limit set for each launch could be
// replaced by a smaller one of another host thread before the launch that needs it.
template <class Kernel>
void open_shared_memory() {
  static std::atomic<uint64_t> opened{0};  // a bit for each of the first 64 devices
  int index = 0;
  check(cudaGetDevice(&index), "finding the current device");
  const uint64_t bit = index < 64 ? uint64_t{1} << index : 0;
  if ((opened.load(std::memory_order_acquire) & bit) != 0) return;
  cudaFuncAttributes kernel{};
  check(cudaFuncGetAttributes(&kernel, run<Kernel>), "reading a kernel's attributes");
  const int64_t most = device().shared_memory - static_cast<int64_t>(kernel.sharedSizeBytes);
  check(cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(most)),
        "asking for shared memory");
  opened.fetch_or(bit, std::memory_order_release);
}

// How many blocks of this kernel run at the same time on the current device.
template <class Kernel>
int64_t resident_blocks(size_t shared_memory) {
  static std::mutex mutex;
  static std::map<std::pair<int, size_t>, int64_t> known;
  const Device on = device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(on.index, shared_memory);
  const auto entry = known.find(key);
  if (entry != known.end()) return entry->second;
  open_shared_memory<Kernel>();
  int per_processor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, run<Kernel>, Kernel::kThreads,
                                                      shared_memory),
        "counting resident blocks");
  // A launch of 0 blocks would do nothing without an error.
  if (per_processor == 0)
    throw std::runtime_error("CUDA: a block of " + std::to_string(Kernel::kThreads) +
                             " threads and " + std::to_string(shared_memory) +
                             " bytes of shared memory does not fit this device");
  return known[key] = int64_t{per_processor} * on.processors;
}

struct Launch {
  int64_t blocks;
  size_t shared_memory = 0;  // in bytes
  // All blocks run at the same time, so they may call sync_blocks(). At most resident_blocks().
  bool cooperative = false;
};

template <class Kernel>
void launch(const char* op, const Kernel& kernel, const Launch& how, Stream stream) {
  static_assert(std::is_trivially_copyable_v<Kernel> && sizeof(Kernel) <= 32764);
  if (how.blocks == 0) return;
  if (how.shared_memory > 48 * 1024) open_shared_memory<Kernel>();
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = how.shared_memory;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = how.cooperative ? 1 : 0;
  // The result of this launch only; errors of earlier work stay for their own checks.
  check(cudaLaunchKernelEx(&config, run<Kernel>, kernel), op);
}

}  // namespace torch_ext::gpu
