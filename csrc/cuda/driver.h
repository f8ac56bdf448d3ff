#pragma once

// The CUDA side. A build without it links unavailable.cpp, which has the same declarations.
namespace torch_ext::cuda {

// Whether this build has CUDA kernels.
bool available();

}  // namespace torch_ext::cuda
