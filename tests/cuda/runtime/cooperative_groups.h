#pragma once

namespace cooperative_groups {

struct Grid {
  void sync() const;
};
Grid this_grid();

}  // namespace cooperative_groups
