#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "bindings/contracts.h"
#include "core/job.h"
#include "core/option.h"
#include "cuda/driver.h"

namespace torch_ext::bindings {

// A temporary statistic on x's device for a rule that reads `needs` of it. Empty on the CPU; on
// CUDA uninitialised memory, which observe() in mode() takes as empty.
struct Transient {
  Transient(const at::Tensor& x, int64_t channels, core::Needs needs, core::HistogramLayout layout);

  core::Statistic statistic() const;
  // The mode of the first observe() into it. `unless`: a flag on the device, or null; where it is
  // set nothing is observed.
  cuda::ObserveMode mode(const uint8_t* unless) const;

  const core::HistogramLayout layout;
  const at::Tensor extrema, tally;
  at::Tensor counts;  // undefined where the rule reads none
};

const char* rule_name(int32_t rule);

// The range float32 [C, 2] of one tensor, from a temporary statistic in the default layout.
at::Tensor solve_tensor(const OneShot& call);

}  // namespace torch_ext::bindings
