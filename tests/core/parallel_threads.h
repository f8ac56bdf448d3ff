#pragma once

#include <cstdint>

namespace torch_ext::cpu {

// Number of threads that parallel_for uses in these tests; assignable.
int64_t& test_threads();

}  // namespace torch_ext::cpu
