#include "cuda/driver.h"

// In a file of its own, so that a program that only calls available() does not link the CUDA
// runtime.
namespace torch_ext::cuda {

bool available() { return true; }

}  // namespace torch_ext::cuda
