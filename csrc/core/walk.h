#pragma once

#include <cstdint>

#include "core/divide.h"
#include "core/host_device.h"
#include "core/job.h"

namespace torch_ext::core {

struct Dim {
  int64_t size;
  int64_t stride;
};

// The dimensions that the values of one channel span, innermost in memory first. Neighbours that
// are contiguous to each other are merged; expanded ones (stride 0) come last.
struct Walk {
  // A tensor with more dimensions of size 2 or more would have more than 2^63 elements.
  static constexpr int kMaxDims = 64;
  Dim dims[kMaxDims];
  int32_t count;  // at least 1

  TE_HD int64_t values() const {
    int64_t n = 1;
    for (int32_t d = 0; d < count; ++d) n *= dims[d].size;
    return n;
  }
  TE_HD int64_t operator()(int64_t i) const { return offset(i); }
  // Offset of value i, in elements.
  TE_HD int64_t offset(int64_t i) const {
    int64_t at = 0;
    for (int32_t d = 0; d + 1 < count; ++d) {
      at += modulo(i, dims[d].size) * dims[d].stride;
      i = quotient(i, dims[d].size);
    }
    return at + i * dims[count - 1].stride;
  }
};

// The walk over the values of one channel of x; over all values for ch_axis -1.
inline Walk walk_of(const TensorView& x, int32_t ch_axis) {
  Walk walk{};
  const auto comes_after = [](const Dim& a, const Dim& b) {
    return (b.stride != 0 && a.stride > b.stride) || (a.stride == 0 && b.stride != 0);
  };
  for (int32_t d = 0; d < x.ndim; ++d) {
    if (d == ch_axis || x.sizes[d] == 1) continue;
    if (x.sizes[d] == 0) {
      walk.dims[0] = {0, 1};
      walk.count = 1;
      return walk;
    }
    int32_t at = walk.count++;
    for (; at > 0 && comes_after(walk.dims[at - 1], {x.sizes[d], x.strides[d]}); --at)
      walk.dims[at] = walk.dims[at - 1];
    walk.dims[at] = {x.sizes[d], x.strides[d]};
  }
  int32_t merged = 0;
  for (int32_t d = 0; d < walk.count; ++d) {
    const Dim next = walk.dims[d];
    if (merged > 0 && next.stride == walk.dims[merged - 1].stride * walk.dims[merged - 1].size)
      walk.dims[merged - 1].size *= next.size;
    else
      walk.dims[merged++] = next;
  }
  if (merged == 0) walk.dims[merged++] = {1, 1};
  walk.count = merged;
  return walk;
}

}  // namespace torch_ext::core
