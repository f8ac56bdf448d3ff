#include "bindings/exclusive.h"

#include <array>
#include <cstdint>

namespace torch_ext::bindings {
namespace {

constexpr size_t kMutexes = 64;
constexpr size_t kAlignment = 64;  // of torch's allocations on the CPU; on CUDA it is 512

std::mutex& mutex_of(const void* memory) {
  static std::array<std::mutex, kMutexes> mutexes;
  const size_t block = reinterpret_cast<uintptr_t>(memory) / kAlignment;
  return mutexes[(block ^ block / kMutexes) % kMutexes];
}

}  // namespace

Exclusive::Exclusive(const at::Tensor& updated) : lock_(mutex_of(updated.const_data_ptr())) {}

}  // namespace torch_ext::bindings
