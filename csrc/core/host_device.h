#pragma once

// Marks functions that run on the host and on the device. Always inlined: these headers are
// compiled into objects for several instruction sets, and an inline function that is not inlined
// becomes one weak symbol, of which the linker may keep the AVX-512 copy for all callers.
#if defined(__CUDACC__)
#define TE_HD __host__ __device__ __forceinline__
#else
#define TE_HD inline __attribute__((always_inline))
#endif
