#pragma once

#include <cstdint>
#include <span>

// The instruction sets that the inner loops are compiled for (kernels.h), and the choice of one.
// Apart from the loops, so that the extension module, which only asks for the name, does not link
// them.
namespace torch_ext::cpu {

enum class Capability : int32_t { base, avx2, avx512 };

const char* name_of(Capability set);

// Those that this processor can run, best last.
std::span<const Capability> runnable();

// The best set that this processor can run, or the one that TORCH_EXT_CPU_CAPABILITY names. Chosen
// once. Throws std::invalid_argument if the variable names a set that is unknown or cannot run.
Capability chosen();

}  // namespace torch_ext::cpu
