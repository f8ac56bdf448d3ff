#pragma once

#include <cstdint>

#include "core/grid.h"

namespace torch_ext::core {

// An option of a rule. Values are passed as doubles; a choice is passed as the index of its name.
struct Option {
  const char* name;
  double value;    // default
  double minimum;  // inclusive
  double maximum;  // inclusive
  const char* const* choices = nullptr;
  int32_t choice_count = 0;
};

// Options of a rule that has none.
struct NoOptions {
  static constexpr const Option* options = nullptr;
  static constexpr int32_t option_count = 0;
};

// What is wrong with a rule's options on a grid, for `expected ARGUMENT to be WANT, got HAVE`;
// `want` null: nothing.
struct Complaint {
  const char* argument = nullptr;
  const char* want = nullptr;
  double have = 0;
};

// What a rule reads of a statistic: nothing, extrema, also counts, or also sums of x and x^2.
enum class Needs : int32_t { nothing = 0, extrema = 1, counts = 2, moments = 3 };

}  // namespace torch_ext::core
