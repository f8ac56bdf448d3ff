#pragma once

// The headers that isa.inc needs, included outside its namespace. All their functions have to be
// inlined: of one that is not, the linker would keep one instruction set's copy for all callers.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <new>

#include "cpu/kernels.h"
#include "registry.h"
