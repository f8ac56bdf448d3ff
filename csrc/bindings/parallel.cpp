#include "cpu/parallel.h"

#include <ATen/Parallel.h>

namespace torch_ext::cpu {

void run_on_pool(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  at::parallel_for(begin, end, grain, body);
}

int64_t num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

}  // namespace torch_ext::cpu
