#pragma once

#include "cpu/accumulate.h"
#include "cpu/capability.h"
#include "cpu/dynamic.h"
#include "cpu/gptq.h"
#include "cpu/map.h"
#include "cpu/map_reduce.h"
#include "cpu/solve.h"

// The inner loops of all drivers, compiled from one source for several instruction sets
// (isa_*.cpp).
namespace torch_ext::cpu {

struct Kernels {
  const char* name;
  AccumulateKernels accumulate;
  MapKernels map;
  MapReduceKernels map_reduce;
  SolveKernels solve;
  GptqKernels gptq;
  DynamicKernels dynamic;
};

// Those of chosen(); throws as it does.
const Kernels& kernels();

// Those of runnable(), best last; null-terminated.
const Kernels* const* runnable_kernels();

namespace base {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}

}  // namespace torch_ext::cpu
