#pragma once

#include <cstdint>

#include "core/job.h"
#include "core/learned.h"

// How contiguous data [outer, channels, inner] is cut into parts for the gradients of learned
// parameters. Each part is summed first, then the parts.
namespace torch_ext::core {

// Rows shorter than this, where there are several channels, are summed element after element, a few
// rows in a part; longer ones in lanes (core/learned.h).
constexpr int64_t kLongRow = 32;
constexpr int64_t kShortPart = 64;

struct Parts {
  bool rows;         // a part is whole outer rows of a channel, else a piece of one row
  int64_t per_part;  // outer rows where `rows`, else values
  int64_t per_row;   // parts of a row (1 where `rows`)
  int64_t count;     // parts of a channel
};

TE_HD Parts parts_of(const ChannelLayout& layout) {
  if (layout.channels > 1 && layout.inner < kLongRow) {
    const int64_t rows = kShortPart / layout.inner > 1 ? kShortPart / layout.inner : 1;
    return {true, rows, 1, (layout.outer + rows - 1) / rows};
  }
  const int64_t per_row = sums_of(layout.inner);
  return {false, kSumLength, per_row, layout.outer * per_row};
}

}  // namespace torch_ext::core
