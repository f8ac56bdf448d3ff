#pragma once

// The project's one marker for code that runs on both sides. Force-inlined, because these headers
// are compiled into objects for several instruction sets: an inline function that is not inlined
// becomes one weak symbol, and the linker may keep the AVX-512 copy for everybody.
#if defined(__CUDACC__)
#define TE_HD __host__ __device__ __forceinline__
#else
#define TE_HD inline __attribute__((always_inline))
#endif
