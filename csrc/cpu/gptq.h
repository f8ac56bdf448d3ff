#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/grid.h"
#include "core/unit_grid.h"

// Rounding of weights one input after the other, the error of each fed to those after it (GPTQ,
// Frantar et al. 2022). The order of the inputs and the damping are the caller's.
namespace torch_ext::cpu {

// Weights [groups, rows, inputs] of the computing type, contiguous: a row is one output of a group.
struct GptqJob {
  int64_t groups;
  int64_t rows;
  int64_t inputs;
  const void* weight;
  void* out;             // the values of the grid, of the weight's type
  const double* factor;  // [groups, inputs, inputs], upper: inverse Hessian = transpose * factor
  const float* scale;
  const int32_t* zero_point;
  int64_t scale_strides[3];  // in elements; 0 where neighbours share one
  int64_t zero_point_strides[3];
  core::Codes codes;
  core::Rounding rounding;
};

// The rows of a group that are rounded together, so that the factor is read once for all of them.
constexpr int64_t kGptqRows = 16;
// Inputs whose errors are fed to those after them at once.
constexpr int64_t kGptqBlock = 64;

// The inner loops, compiled once per instruction set.
struct GptqKernels {
  // Rounds rows [first, first + count) of a group, count <= kGptqRows. `work` is [count, inputs].
  void (*rows_f32)(const GptqJob& job, int64_t group, int64_t first, int64_t count, double* work);
  void (*rows_f64)(const GptqJob& job, int64_t group, int64_t first, int64_t count, double* work);
};

// For float32 and float64. A row's result depends on that row and the factor alone.
void gptq(core::DType dtype, const GptqJob& job);

}  // namespace torch_ext::cpu
