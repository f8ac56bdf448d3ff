// What a GPU's memory allows: reading a buffer, copying it, and reading two to write one, in three
// ways each, of which any may be the fastest. Beside them a peer that Torch does not offer: CUB's
// histogram. Raw pointers on the caller's stream; every function returns a cudaError_t.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cub/device/device_histogram.cuh>

namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 8;  // loads of 16 bytes in flight per thread

enum class Way : int32_t { persistent = 0, tiles = 1, tiles_streaming = 2 };

template <bool streaming>
__device__ __forceinline__ uint4 load(const uint4* from) {
  return streaming ? __ldcs(from) : *from;
}

template <bool streaming>
__device__ __forceinline__ void store(uint4* to, uint4 value) {
  if (streaming)
    __stcs(to, value);
  else
    *to = value;
}

__device__ __forceinline__ uint4 mixed(uint4 a, uint4 b) {
  return make_uint4(a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w);
}

// Calls work(i) for runs of kUnroll vectors, a tile at a time; what a tile does not fill is left
// out, which is nothing where the number of vectors is a multiple of kThreads * kUnroll.
template <class Work>
__device__ __forceinline__ void over_tiles(int64_t vectors, const Work& work) {
  constexpr int64_t kTile = int64_t{kThreads} * kUnroll;
  for (int64_t begin = kTile * blockIdx.x; begin + kTile <= vectors; begin += kTile * gridDim.x)
    work(begin + threadIdx.x);
}

template <bool streaming>
__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4* x, int64_t vectors, uint32_t* sink) {
  uint4 sum = make_uint4(0, 0, 0, 0);
  over_tiles(vectors, [&](int64_t first) {
    uint4 v[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) v[k] = load<streaming>(x + first + k * kThreads);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) sum = mixed(sum, v[k]);
  });
  // So that the loads are not left out; what is written does not matter.
  if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x5bd1e995u) *sink = sum.x;
}

template <bool streaming>
__global__ void __launch_bounds__(kThreads)
    copy_kernel(const uint4* x, uint4* out, int64_t vectors) {
  over_tiles(vectors, [&](int64_t first) {
    uint4 v[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) v[k] = load<streaming>(x + first + k * kThreads);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) store<streaming>(out + first + k * kThreads, v[k]);
  });
}

template <bool streaming>
__global__ void __launch_bounds__(kThreads)
    mix_kernel(const uint4* x, const uint4* y, uint4* out, int64_t vectors) {
  over_tiles(vectors, [&](int64_t first) {
    uint4 v[kUnroll], w[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) v[k] = load<streaming>(x + first + k * kThreads);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) w[k] = load<streaming>(y + first + k * kThreads);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      store<streaming>(out + first + k * kThreads, mixed(v[k], w[k]));
  });
}

int64_t blocks_of(Way way, int64_t vectors) {
  const int64_t tiles = vectors / (int64_t{kThreads} * kUnroll);
  if (way != Way::persistent) return tiles;
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return tiles < 4 * processors ? tiles : 4 * processors;
}

template <class Launch>
int32_t launched(int32_t way, int64_t bytes, const Launch& launch) {
  const int64_t vectors = bytes / 16, blocks = blocks_of(static_cast<Way>(way), vectors);
  if (blocks < 1 || blocks > 0x7fffffff) return cudaErrorInvalidValue;
  launch(vectors, static_cast<unsigned>(blocks), static_cast<Way>(way) == Way::tiles_streaming);
  return cudaGetLastError();
}

template <class Sample>
int32_t histogram(const void* x, int64_t n, float low, float high, int32_t bins, int32_t* counts,
                  void* scratch, size_t* scratch_bytes, cudaStream_t stream) {
  return cub::DeviceHistogram::HistogramEven(
      scratch, *scratch_bytes, static_cast<const Sample*>(x), counts, bins + 1,
      static_cast<Sample>(low), static_cast<Sample>(high), static_cast<int>(n), stream);
}

}  // namespace

extern "C" {

// Bytes are a multiple of 64 KiB; buffers start at a 16-byte boundary.
int32_t ceiling_read(const void* x, int64_t bytes, void* sink, int32_t way, cudaStream_t stream) {
  return launched(way, bytes, [&](int64_t vectors, unsigned blocks, bool streaming) {
    const auto kernel = streaming ? read_kernel<true> : read_kernel<false>;
    kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const uint4*>(x), vectors,
                                            static_cast<uint32_t*>(sink));
  });
}

int32_t ceiling_copy(const void* x, void* out, int64_t bytes, int32_t way, cudaStream_t stream) {
  return launched(way, bytes, [&](int64_t vectors, unsigned blocks, bool streaming) {
    const auto kernel = streaming ? copy_kernel<true> : copy_kernel<false>;
    kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const uint4*>(x), static_cast<uint4*>(out),
                                            vectors);
  });
}

int32_t ceiling_mix(const void* x, const void* y, void* out, int64_t bytes, int32_t way,
                    cudaStream_t stream) {
  return launched(way, bytes, [&](int64_t vectors, unsigned blocks, bool streaming) {
    const auto kernel = streaming ? mix_kernel<true> : mix_kernel<false>;
    kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const uint4*>(x),
                                            static_cast<const uint4*>(y), static_cast<uint4*>(out),
                                            vectors);
  });
}

// CUB's histogram of `bins` equal bins from low to high; with scratch null it only says how much of
// that it needs. dtype: 0 float32, 1 float16, 2 bfloat16.
int32_t cub_histogram(const void* x, int32_t dtype, int64_t n, float low, float high, int32_t bins,
                      int32_t* counts, void* scratch, size_t* scratch_bytes, cudaStream_t stream) {
  const auto of = dtype == 0   ? histogram<float>
                  : dtype == 1 ? histogram<__half>
                               : histogram<__nv_bfloat16>;
  return of(x, n, low, high, bins, counts, scratch, scratch_bytes, stream);
}

const char* error_text(int32_t error) { return cudaGetErrorString(cudaError_t(error)); }

}  // extern "C"
