#pragma once

namespace torch_ext::bindings {

// Whether a backward pass runs on this thread: activation checkpointing then repeats a forward,
// whose values have been observed already.
bool recomputing();

}  // namespace torch_ext::bindings
