#include "cpu/isa.h"

namespace torch_ext::cpu::avx2 {
#include "cpu/isa.inc"
extern const Kernels table = {"avx2",        accumulate_kernels, map_kernels,    map_reduce_kernels,
                              solve_kernels, gptq_kernels,       dynamic_kernels};
}  // namespace torch_ext::cpu::avx2
