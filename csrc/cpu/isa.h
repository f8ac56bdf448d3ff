#pragma once

// All that isa.inc needs, included outside its namespace. Nothing here may leave a function that is
// not inlined: the linker would keep one instruction set's copy for everybody.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <new>

#include "cpu/kernels.h"
#include "registry.h"
