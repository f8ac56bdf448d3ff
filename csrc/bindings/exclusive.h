#pragma once

#include <ATen/core/Tensor.h>

#include <mutex>

namespace torch_ext::bindings {

// For its lifetime no other thread updates the same tensors in place: several threads may run one
// model. On CUDA it covers the enqueuing, so that the kernels of one update stay together in their
// stream. Tensors share a fixed number of mutexes, so a thread must not make a second one.
class Exclusive {
 public:
  explicit Exclusive(const at::Tensor& updated);
  // Also for a tensor that is read while another thread may update it.
  Exclusive(const at::Tensor& updated, const at::Tensor& read);

 private:
  std::unique_lock<std::mutex> first_, second_;
};

}  // namespace torch_ext::bindings
