#pragma once

#include "core/contract.h"
#include "core/lattice.h"

namespace torch_ext::observers {

// The range of the data, clamped to the given bounds.
struct Clip {
  static constexpr const char* name = "clip";
  static constexpr core::Needs needs = core::Needs::extrema;
  static constexpr int max_bits = 16;
  static constexpr core::Option options[] = {{"xmin", -1, -0x1.fffffep127, 0x1.fffffep127},
                                             {"xmax", 1, -0x1.fffffep127, 0x1.fffffep127}};
  static constexpr int32_t option_count = 2;

  TE_HD static core::Complaint complaint(const core::Grid&, core::HistogramLayout,
                                         const double* options) {
    if (options[0] <= options[1]) return {};
    return {"xmin", "at most xmax", options[0]};
  }
  TE_HD static core::Range solve(const core::View& view, const core::Grid&, const double* options) {
    return {core::clamp(view.min, options[0], options[1]),
            core::clamp(view.max, options[0], options[1])};
  }
};
static_assert(core::ClosedRule<Clip> && core::ChecksOptions<Clip>);

}  // namespace torch_ext::observers
