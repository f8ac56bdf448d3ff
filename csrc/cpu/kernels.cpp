#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace torch_ext::cpu {
namespace {

struct Runnable {
  const Kernels* sets[4] = {&base::table, nullptr, nullptr, nullptr};
};

Runnable find_runnable() {
  Runnable runnable;
#if defined(__x86_64__)
  int count = 1;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    runnable.sets[count++] = &avx2::table;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    runnable.sets[count++] = &avx512::table;
#endif
  return runnable;
}

const Kernels& choose() {
  const char* wanted = std::getenv("TORCH_EXT_CPU_CAPABILITY");
  std::string known;
  const Kernels* best = nullptr;
  for (const Kernels* const* set = runnable_kernels(); *set != nullptr; ++set) {
    if (wanted != nullptr && std::strcmp(wanted, (*set)->name) == 0) return **set;
    if (!known.empty()) known += ", ";
    known += (*set)->name;
    best = *set;
  }
  if (wanted == nullptr || *wanted == '\0') return *best;
  throw std::invalid_argument("torch_ext: expected TORCH_EXT_CPU_CAPABILITY to be one of " + known +
                              ", got " + wanted);
}

}  // namespace

const Kernels* const* runnable_kernels() {
  static const Runnable runnable = find_runnable();
  return runnable.sets;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace torch_ext::cpu
