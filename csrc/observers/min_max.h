#pragma once

#include "core/contract.h"

namespace torch_ext::observers {

// The range of the data.
struct MinMax : core::NoOptions {
  static constexpr const char* name = "min_max";
  static constexpr core::Needs needs = core::Needs::extrema;
  static constexpr int max_bits = 16;

  TE_HD static core::Range solve(const core::View& view, const core::Grid&, const double*) {
    return {view.min, view.max};
  }
};
static_assert(core::ClosedRule<MinMax>);

}  // namespace torch_ext::observers
