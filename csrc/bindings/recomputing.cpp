#include "bindings/recomputing.h"

#include <torch/csrc/autograd/graph_task.h>

namespace torch_ext::bindings {

bool recomputing() { return torch::autograd::get_current_graph_task_id() != -1; }

}  // namespace torch_ext::bindings
