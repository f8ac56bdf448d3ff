#pragma once

namespace torch_ext::bindings {

// Whether a backward pass runs on this thread. A forward inside it is activation checkpointing's
// recomputation: its values have been observed already and must not be counted twice.
bool recomputing();

}  // namespace torch_ext::bindings
