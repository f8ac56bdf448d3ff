#include "bindings/exclusive.h"

#include <pthread.h>

#include <array>
#include <mutex>

#include "cpu/accumulator.h"

namespace torch_ext::bindings {
namespace {

constexpr size_t kMutexes = 64;
constexpr size_t kAlignment = 64;  // of torch's allocations on the CPU; on CUDA it is 512

std::array<std::mutex, kMutexes> mutexes;

// Always in ascending order, so threads do not wait for each other in a circle.
void lock(uint64_t some) {
  for (size_t i = 0; i < kMutexes; ++i)
    if ((some >> i & 1) != 0) mutexes[i].lock();
}
void unlock(uint64_t some) {
  for (size_t i = 0; i < kMutexes; ++i)
    if ((some >> i & 1) != 0) mutexes[i].unlock();
}

// Those of tensors first: who holds one may be waiting for the pool.
void hold_all() {
  lock(~uint64_t{0});
  cpu::Counters::hold_pool();
}
void release_all() {
  cpu::Counters::release_pool();
  unlock(~uint64_t{0});
}

// A child has only the thread that forked. A mutex held by another would stay locked forever, and
// the tensors that it protects half updated.
const int at_fork = pthread_atfork(hold_all, release_all, release_all);

uint64_t mutexes_of(at::TensorList tensors) {
  uint64_t some = 0;
  for (const at::Tensor& tensor : tensors) {
    const size_t block = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) / kAlignment;
    some |= uint64_t{1} << (block ^ block / kMutexes) % kMutexes;
  }
  return some;
}

}  // namespace

Exclusive::Exclusive(at::TensorList tensors) : held_(mutexes_of(tensors)) { lock(held_); }
Exclusive::~Exclusive() { unlock(held_); }

}  // namespace torch_ext::bindings
