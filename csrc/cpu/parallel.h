#pragma once

#include <cstdint>
#include <functional>

// The thread pool. Which one is decided by linking: at::parallel_for in the op library, std::thread
// in the tests without torch. No result may depend on how the range is split.
namespace torch_ext::cpu {

// Runs body(b, e) over pieces that cover [begin, end), each of at least `grain` indices but the
// last.
void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body);

// How many pieces can run at the same time; 1 inside a parallel region.
int64_t num_threads();

}  // namespace torch_ext::cpu
