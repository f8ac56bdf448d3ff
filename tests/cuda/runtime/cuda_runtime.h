#pragma once

#include <cstddef>
#include <cstdint>

// What csrc/cuda/device/gpu.h uses of CUDA, for a host without it: launches are checked as CUDA
// checks them, and nothing runs. What only a device could do is declared and not defined.
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

struct CUstream_st;
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct int4 {
  int x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};
uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w);

extern const uint3 threadIdx, blockIdx;
extern const dim3 gridDim;
void __syncthreads();
int __syncthreads_or(int value);
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes);
template <class T>
T atomicAdd(T* to, T value);
int atomicMin(int* to, int value);
int atomicMax(int* to, int value);

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  CUstream_st* stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// A machine with devices of different sizes.
namespace fake {

constexpr int kDevices = 2;
constexpr int kSharedMemory[kDevices] = {100 * 1024, 227 * 1024};
constexpr int kStatic = 1024;  // bytes of shared memory that every kernel has declared

void set_device(int index);  // of this host thread
void fail_next_launch(cudaError_t error);
int limits_set();  // calls of cudaFuncSetAttribute() so far
cudaError_t set_limit(const void* kernel, int bytes);
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config);
int resident(size_t shared_memory);

}  // namespace fake

cudaError_t cudaGetDevice(int* index);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, Kernel*) {
  of->sharedSizeBytes = fake::kStatic;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return fake::set_limit(reinterpret_cast<const void*>(kernel), value);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int,
                                                          size_t shared_memory) {
  *blocks = fake::resident(shared_memory);
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&...) {
  return fake::launch(reinterpret_cast<const void*>(kernel), *config);
}
