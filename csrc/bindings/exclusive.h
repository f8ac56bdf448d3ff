#pragma once

#include <ATen/core/Tensor.h>

#include <mutex>

namespace torch_ext::bindings {

// For its lifetime no other thread updates the same tensor in place: several threads may run one
// model. On CUDA it covers the enqueuing, so that the kernels of one update stay together in their
// stream. Tensors share a fixed number of mutexes, so a thread must not make a second one.
class Exclusive {
 public:
  explicit Exclusive(const at::Tensor& updated);

 private:
  const std::lock_guard<std::mutex> lock_;
};

}  // namespace torch_ext::bindings
