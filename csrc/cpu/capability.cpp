#include "cpu/capability.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace torch_ext::cpu {
namespace {

struct Runnable {
  Capability sets[3] = {Capability::base};
  size_t count = 1;
};

Runnable find_runnable() {
  Runnable found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    found.sets[found.count++] = Capability::avx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found.sets[found.count++] = Capability::avx512;
#endif
  return found;
}

Capability choose() {
  const char* wanted = std::getenv("TORCH_EXT_CPU_CAPABILITY");
  std::string known;
  for (const Capability set : runnable()) {
    if (wanted != nullptr && std::strcmp(wanted, name_of(set)) == 0) return set;
    if (!known.empty()) known += ", ";
    known += name_of(set);
  }
  if (wanted == nullptr || *wanted == '\0') return runnable().back();
  throw std::invalid_argument("torch_ext: expected TORCH_EXT_CPU_CAPABILITY to be one of " + known +
                              ", got " + wanted);
}

}  // namespace

const char* name_of(Capability set) {
  constexpr const char* kNames[] = {"base", "avx2", "avx512"};
  return kNames[static_cast<int32_t>(set)];
}

std::span<const Capability> runnable() {
  static const Runnable found = find_runnable();
  return {found.sets, found.count};
}

Capability chosen() {
  static const Capability set = choose();
  return set;
}

}  // namespace torch_ext::cpu
