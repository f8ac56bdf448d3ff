#include "cuda/driver.h"

namespace torch_ext::cuda {

bool available() { return false; }

}  // namespace torch_ext::cuda
