// What memory allows: reading a buffer of floats and copying it, in two ways each, of which either
// may be the faster one. `ahead` is how many floats ahead to prefetch, 0 for none: that helps where
// the data lies in memory and costs a little in the caches.
#include <cstdint>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

using Vector = float __attribute__((vector_size(64), aligned(64)));
constexpr int64_t kLanes = 16;
constexpr int64_t kUnroll = 8;  // cache lines per step

void store_streaming(Vector* to, const Vector& value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(to), reinterpret_cast<const __m512&>(value));
#elif defined(__SSE__)
  const __m128* parts = reinterpret_cast<const __m128*>(&value);
  for (int k = 0; k < 4; ++k) _mm_stream_ps(reinterpret_cast<float*>(to) + 4 * k, parts[k]);
#else
  *to = value;
#endif
}

}  // namespace

extern "C" {

// Both take n floats at a 64-byte boundary and leave those past the last multiple of 128 out. They
// run on the OpenMP pool of this process, which is the one that Torch has loaded and set.

float ceiling_read(const float* x, int64_t n, int64_t ahead) {
  const Vector* from = reinterpret_cast<const Vector*>(x);
  const int64_t vectors = n / kLanes / kUnroll * kUnroll;
  float total = 0;
#pragma omp parallel reduction(+ : total)
  {
    Vector sum[kUnroll] = {};
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < vectors; i += kUnroll)
      for (int64_t k = 0; k < kUnroll; ++k) {
        if (ahead != 0) __builtin_prefetch(x + kLanes * (i + k) + ahead);
        sum[k] += from[i + k];
      }
    for (const Vector& part : sum)
      for (int64_t lane = 0; lane < kLanes; ++lane) total += part[lane];
  }
  return total;
}

void ceiling_copy(const float* x, float* out, int64_t n) {
  const Vector* from = reinterpret_cast<const Vector*>(x);
  Vector* to = reinterpret_cast<Vector*>(out);
  const int64_t vectors = n / kLanes / kUnroll * kUnroll;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < vectors; i += kUnroll)
    for (int64_t k = 0; k < kUnroll; ++k) to[i + k] = from[i + k];
}

// With stores that bypass the caches: faster above the last-level cache, slower within it.
void ceiling_copy_streaming(const float* x, float* out, int64_t n, int64_t ahead) {
  const Vector* from = reinterpret_cast<const Vector*>(x);
  Vector* to = reinterpret_cast<Vector*>(out);
  const int64_t vectors = n / kLanes / kUnroll * kUnroll;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < vectors; i += kUnroll)
    for (int64_t k = 0; k < kUnroll; ++k) {
      __builtin_prefetch(x + kLanes * (i + k) + ahead);
      store_streaming(to + i + k, from[i + k]);
    }
}

}  // extern "C"
