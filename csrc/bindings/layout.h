#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "core/job.h"

// Memory formats. Element-wise ops read and write in the order of memory, and their results have
// the format of x, as those of torch's own do.
namespace torch_ext::bindings {

// The axes of x in the order of memory, outermost first; empty where that is their own order, as it
// is for x that is expanded. Sizes and strides may be symbolic.
std::vector<int64_t> order_of(const at::Tensor& x);

// The order in which an op on the last of so many axes works, whose values have to lie together:
// their own order, which is empty, where they do not in this one.
at::IntArrayRef order_by_last_axis(at::IntArrayRef order, int64_t axes);

// An uninitialised dense tensor of x's sizes and type, in an order of memory.
at::Tensor empty_in(at::IntArrayRef order, const at::Tensor& x);

// t where it has the strides of `like`, a dense tensor of its sizes; else a copy that has them.
at::Tensor with_strides_of(const at::Tensor& like, const at::Tensor& t);

// The elements of a dense tensor, in the order of memory, as [outer, channels, inner].
core::ChannelLayout channel_layout(const at::Tensor& dense, int64_t ch_axis);

}  // namespace torch_ext::bindings
