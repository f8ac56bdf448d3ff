#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <exception>
#include <string>

#include "cuda/errors.h"

namespace torch_ext::bindings {

// Calls `work`, which allocates scratch memory on the device and enqueues kernels. Its errors name
// the op. Torch's own keep their type, and so does memory that runs out, whoever asks for it:
// callers catch torch.OutOfMemoryError and try again with less.
template <class Work>
void enqueue(const char* op, const c10::Device& device, const Work& work) {
  const auto wanted = [&] {
    return std::string(op) + ": expected the work on " + device.str() + " to be enqueued";
  };
  try {
    work();
  } catch (c10::Error& error) {
    error.add_context(wanted());
    throw;
  } catch (const cuda::OutOfMemory& error) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, wanted(), ", got ", error.what());
  } catch (const std::exception& error) {
    TORCH_CHECK(false, wanted(), ", got ", error.what());
  }
}

}  // namespace torch_ext::bindings
