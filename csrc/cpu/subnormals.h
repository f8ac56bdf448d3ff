#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

// torch.set_flush_denormal(True) makes the calling thread take subnormal numbers as zero, and
// leaves the threads of the pool as they are: results would depend on the number of threads.
namespace torch_ext::cpu {

// Computes with subnormal numbers on this thread while it lives.
class KeepSubnormals {
 public:
  KeepSubnormals() : before_(read()) {
    if ((before_ & kFlushes) != 0) write(before_ & ~kFlushes);
  }
  ~KeepSubnormals() {
    if ((before_ & kFlushes) != 0) write(before_);
  }
  KeepSubnormals(const KeepSubnormals&) = delete;
  KeepSubnormals& operator=(const KeepSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  using Register = uint32_t;
  static constexpr Register kFlushes = 0x8040;  // MXCSR: flush to zero, denormals are zero
  static Register read() { return _mm_getcsr(); }
  static void write(Register value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
  using Register = uint64_t;
  static constexpr Register kFlushes = 1u << 24;  // FPCR.FZ
  static Register read() {
    Register value;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void write(Register value) { __asm__ __volatile__("msr fpcr, %0" : : "r"(value)); }
#else
  using Register = uint32_t;
  static constexpr Register kFlushes = 0;
  static Register read() { return 0; }
  static void write(Register) {}
#endif
  const Register before_;
};

}  // namespace torch_ext::cpu
