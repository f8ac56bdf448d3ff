#pragma once

#include <cstdint>
#include <functional>

#include "cpu/subnormals.h"

// The thread pool. Which one is decided by linking: at::parallel_for in the op library, std::thread
// in the tests without torch. No result may depend on how the range is split.
namespace torch_ext::cpu {

using Body = std::function<void(int64_t, int64_t)>;

// The pool's own loop; drivers call parallel_for().
void run_on_pool(int64_t begin, int64_t end, int64_t grain, const Body& body);

// Runs body(b, e) over pieces that cover [begin, end), each of at least `grain` indices but the
// last.
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  run_on_pool(begin, end, grain, [&body](int64_t b, int64_t e) {
    const KeepSubnormals keep;
    body(b, e);
  });
}

// How many pieces can run at the same time; 1 inside a parallel region.
int64_t num_threads();

}  // namespace torch_ext::cpu
