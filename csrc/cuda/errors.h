#pragma once

#include <stdexcept>

namespace torch_ext::cuda {

// The device has no memory left. Other errors of CUDA are plain std::runtime_error.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace torch_ext::cuda
