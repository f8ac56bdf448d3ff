// What memory allows: read, copy, and two reads with one write, over float buffers. `streaming`
// asks for stores that bypass the caches: faster above the last-level cache, slower within it.
#include <cstdint>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

using Vector = float __attribute__((vector_size(64), aligned(64)));
constexpr int64_t kLanes = 16;
constexpr int64_t kUnroll = 4;  // cache lines per step

void store(Vector* to, const Vector& value) { *to = value; }

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

// Calls step(i) for i = 0, kUnroll, ..., over n / 16 vectors, cut among the threads of this
// process's OpenMP pool, which is the one that Torch has loaded and set.
template <class Step>
void for_each_step(int64_t n, const Step& step) {
  const int64_t vectors = n / kLanes / kUnroll * kUnroll;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < vectors; i += kUnroll) step(i);
}

}  // namespace

extern "C" {

// The sum of n floats at a 64-byte boundary; those past the last multiple of 64 are left out.
float ceiling_read(const float* x, int64_t n) {
  const Vector* from = reinterpret_cast<const Vector*>(x);
  const int64_t vectors = n / kLanes / (2 * kUnroll) * (2 * kUnroll);
  float total = 0;
#pragma omp parallel reduction(+ : total)
  {
    Vector sum[2 * kUnroll] = {};
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < vectors; i += 2 * kUnroll)
      for (int64_t k = 0; k < 2 * kUnroll; ++k) sum[k] += from[i + k];
    for (const Vector& part : sum)
      for (int64_t lane = 0; lane < kLanes; ++lane) total += part[lane];
  }
  return total;
}

void ceiling_copy(const float* x, float* out, int64_t n, int32_t streaming) {
  const Vector* from = reinterpret_cast<const Vector*>(x);
  Vector* to = reinterpret_cast<Vector*>(out);
  if (streaming != 0)
    for_each_step(n, [=](int64_t i) {
      for (int64_t k = 0; k < kUnroll; ++k) store_streaming(to + i + k, from[i + k]);
    });
  else
    for_each_step(n, [=](int64_t i) {
      for (int64_t k = 0; k < kUnroll; ++k) store(to + i + k, from[i + k]);
    });
}

}  // extern "C"
