#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace torch_ext::bindings {

// For its lifetime no other thread updates the same tensors in place, nor reads them with one of
// these: several threads may run one model. On CUDA it covers the enqueuing, so that the kernels of
// one update stay together in their stream. Tensors share a fixed number of mutexes, so a thread
// must not make a second one. fork() waits for all of them, so that a child finds them free.
class Exclusive {
 public:
  explicit Exclusive(const at::Tensor& tensor) : Exclusive(at::TensorList(tensor)) {}
  Exclusive(const at::Tensor& a, const at::Tensor& b) : Exclusive(at::TensorList({a, b})) {}
  explicit Exclusive(at::TensorList tensors);
  ~Exclusive();
  Exclusive(const Exclusive&) = delete;
  Exclusive& operator=(const Exclusive&) = delete;

 private:
  uint64_t held_;  // bit i: mutex i
};

}  // namespace torch_ext::bindings
