#include "cuda/driver.h"

// Apart from the kernels, so that who asks only this does not link CUDA's run time.
namespace torch_ext::cuda {

bool available() { return true; }

}  // namespace torch_ext::cuda
