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

Exclusive::Exclusive(const at::Tensor& updated) : first_(mutex_of(updated.const_data_ptr())) {}

Exclusive::Exclusive(const at::Tensor& updated, const at::Tensor& read) {
  std::mutex& first = mutex_of(updated.const_data_ptr());
  std::mutex& second = mutex_of(read.const_data_ptr());
  first_ = std::unique_lock(first, std::defer_lock);
  if (&first == &second) {
    first_.lock();
    return;
  }
  second_ = std::unique_lock(second, std::defer_lock);
  std::lock(first_, second_);
}

}  // namespace torch_ext::bindings
