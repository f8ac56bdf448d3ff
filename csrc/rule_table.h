#pragma once

#include <cstdint>
#include <span>

#include "core/grid.h"
#include "core/histogram.h"
#include "core/option.h"

// The registry as plain data, in its order. Files that only need a rule's properties include this
// instead of registry.h, so that a change to one rule's header does not recompile the bindings.
namespace torch_ext {

struct RuleRow {
  const char* name;
  core::Needs needs;
  bool composite;
  int32_t max_bits;
  const char* only_integers;  // why the rule takes no float format; null: it does
  std::span<const core::Option> options;
  // Null where they do not apply: the rule is no search (the first two), does not check its
  // options, computes qparams from the range.
  int64_t (*search_words)(core::HistogramLayout, const core::Grid&, const double* options);
  int64_t (*max_candidates)(core::HistogramLayout);
  core::Complaint (*complaint)(const core::Grid&, core::HistogramLayout, const double* options);
  core::QParams (*given_qparams)(const core::Grid&, const double* options);
};

std::span<const RuleRow> rules();

struct FakeQuantRow {
  const char* name;
  int32_t learned;  // index in LearnedFakeQuants; -1: it does not learn, and the rest is unused
  const char* parameter;
  bool per_channel;
  double start;
  float (*scale)(float parameter, const core::Codes& codes);
};

std::span<const FakeQuantRow> fake_quants();

// 64-bit words of memory that solving a rule needs beside its view. A composite rule runs searches
// with their default options, and keeps their objectives there too.
int64_t work_words(int32_t rule, core::HistogramLayout layout, const core::Grid& grid,
                   const double* options);

}  // namespace torch_ext
