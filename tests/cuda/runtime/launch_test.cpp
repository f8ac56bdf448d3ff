#include <gtest/gtest.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

// The launch of kernels, in csrc/cuda/device/gpu.h, on a stand-in for CUDA's run time.
#include "cuda/device/gpu.h"

namespace fake {
namespace {

std::mutex mutex;
std::map<std::pair<const void*, int>, int> limits;  // by kernel and device
int times_set = 0;
cudaError_t next = cudaSuccess;
thread_local int current = 0;

}  // namespace

void set_device(int index) { current = index; }
int limits_set() { return times_set; }
void fail_next_launch(cudaError_t error) { next = error; }
int resident(size_t shared_memory) {
  return kSharedMemory[current] / (kStatic + static_cast<int>(shared_memory));
}
cudaError_t set_limit(const void* kernel, int bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (bytes < 0 || bytes + kStatic > kSharedMemory[current]) return cudaErrorInvalidValue;
  limits[{kernel, current}] = bytes;
  ++times_set;
  return cudaSuccess;
}
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config) {
  std::this_thread::yield();  // another thread may come between the limit and its launch
  const std::lock_guard<std::mutex> lock(mutex);
  if (next != cudaSuccess) return std::exchange(next, cudaSuccess);
  const auto limit = limits.find({kernel, current});
  const int most = limit == limits.end() ? 48 * 1024 - kStatic : limit->second;
  return static_cast<int>(config.dynamicSmemBytes) <= most ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace fake

cudaError_t cudaGetDevice(int* index) {
  *index = fake::current;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  *value = which == cudaDevAttrMultiProcessorCount ? 10 : fake::kSharedMemory[device];
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "what CUDA says"; }

namespace {

using namespace torch_ext;

template <int>
struct Kernel {
  static constexpr int kThreads = 256;
  void operator()() const {}
};

template <int kOf>
void launch(size_t shared_memory) {
  gpu::launch("op", Kernel<kOf>{}, {1, shared_memory}, nullptr);
}

TEST(Launch, HostThreadsDoNotTakeEachOthersSharedMemory) {
  std::vector<std::string> failed(4);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < failed.size(); ++t)
    threads.emplace_back([&failed, t] {
      fake::set_device(t % 2);
      try {
        for (int i = 0; i < 2000; ++i) {
          const size_t shared_memory = 1024 * (49 + (i * 7 + t * 13) % 50);
          gpu::resident_blocks<Kernel<0>>(shared_memory);
          launch<0>(shared_memory);
        }
      } catch (const std::exception& error) {
        failed[t] = error.what();
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::string& text : failed) EXPECT_EQ(text, "");
}

TEST(Launch, TheLimitIsSetOnceForEachKernelAndDevice) {
  int want = fake::limits_set();
  for (int device = 0; device < fake::kDevices; ++device) {
    fake::set_device(device);
    const size_t most = fake::kSharedMemory[device] - fake::kStatic;
    launch<1>(1024);  // needs no limit
    EXPECT_EQ(fake::limits_set(), want);
    for (const size_t bytes : {size_t{64} * 1024, most, size_t{50} * 1024}) launch<1>(bytes);
    EXPECT_EQ(fake::limits_set(), ++want);
    launch<2>(most);
    EXPECT_EQ(fake::limits_set(), ++want);
    EXPECT_THROW(launch<1>(most + 1), std::runtime_error);
    EXPECT_EQ(gpu::resident_blocks<Kernel<2>>(most), 10);
  }
  EXPECT_EQ(fake::limits_set(), want);
  fake::set_device(0);
}

TEST(Launch, OnlyWantOfMemoryIsOutOfMemory) {
  fake::fail_next_launch(cudaErrorMemoryAllocation);
  EXPECT_THROW(launch<3>(0), cuda::OutOfMemory);
  fake::fail_next_launch(cudaErrorInvalidValue);
  try {
    launch<3>(0);
    FAIL() << "expected an exception";
  } catch (const std::runtime_error& error) {
    EXPECT_EQ(dynamic_cast<const cuda::OutOfMemory*>(&error), nullptr);
    EXPECT_STREQ(error.what(), "CUDA: op: what CUDA says");
  }
  EXPECT_NO_THROW(launch<3>(0));
}

}  // namespace
