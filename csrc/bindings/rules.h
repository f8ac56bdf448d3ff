#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "core/job.h"
#include "core/option.h"
#include "cuda/driver.h"

namespace torch_ext::bindings {

// An empty statistic (on a CUDA device: memory for one) for values like x's, for a rule that needs
// this much of it.
struct Transient {
  Transient(const at::Tensor& x, int64_t channels, core::Needs needs, core::HistogramLayout layout);

  core::Statistic statistic() const;
  // How it is observed into for the first time, unless a flag on the device is set.
  cuda::ObserveMode mode(const uint8_t* unless) const;

  const core::HistogramLayout layout;
  const at::Tensor extrema, tally;
  at::Tensor counts;  // undefined where the rule reads none
};

const char* rule_name(int32_t rule);

// A range [channels, 2] in float32, contiguous.
void check_range(const char* op, const at::Tensor& range, int64_t channels,
                 const at::Device& device);

// The range [C, 2] of one tensor by a rule, with the default statistic.
at::Tensor solve_tensor(const at::Tensor& x, int64_t ch_axis, int32_t rule, const core::Grid& grid,
                        const std::vector<double>& options);

}  // namespace torch_ext::bindings
