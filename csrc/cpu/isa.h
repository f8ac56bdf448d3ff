#pragma once

// The headers that isa.inc needs, included outside its namespace. All their functions have to be
// inlined: of one that is not, the linker would keep one instruction set's copy for all callers.
#if defined(__x86_64__)
// gcc 12 warns of undefined registers in its own header, which are meant to be undefined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#include <cstdint>
#include <new>

#include "cpu/kernels.h"
#include "registry.h"
