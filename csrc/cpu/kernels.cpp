#include "cpu/kernels.h"

#include <algorithm>
#include <array>

namespace torch_ext::cpu {
namespace {

const Kernels* table_of(Capability set) {
#if defined(__x86_64__)
  if (set == Capability::avx2) return &avx2::table;
  if (set == Capability::avx512) return &avx512::table;
#endif
  return &base::table;
}

}  // namespace

const Kernels* const* runnable_kernels() {
  static const std::array<const Kernels*, 4> tables = [] {
    std::array<const Kernels*, 4> found{};
    std::ranges::transform(runnable(), found.begin(), table_of);
    return found;
  }();
  return tables.data();
}

const Kernels& kernels() {
  static const Kernels& table = *table_of(chosen());
  return table;
}

}  // namespace torch_ext::cpu
