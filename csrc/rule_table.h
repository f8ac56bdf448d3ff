#pragma once

#include <cstdint>
#include <span>

#include "core/grid.h"
#include "core/histogram.h"
#include "core/option.h"

// The registry as plain data, in its order. Whoever only asks about a rule includes this and not
// registry.h: a change to one rule's header then compiles no binding anew.
namespace torch_ext {

struct RuleRow {
  const char* name;
  core::Needs needs;
  bool composite;
  int32_t max_bits;
  std::span<const core::Option> options;
  // Null where the rule is no search, has no complaints, follows from the range.
  int64_t (*search_words)(core::HistogramLayout, const core::Grid&, const double* options);
  int64_t (*max_candidates)(core::HistogramLayout);
  core::Complaint (*complaint)(const core::Grid&, core::HistogramLayout, const double* options);
  core::QParams (*given_qparams)(const core::Grid&, const double* options);
};

std::span<const RuleRow> rules();

struct FakeQuantRow {
  const char* name;
  int32_t learned;  // index in LearnedFakeQuants, or -1: then the rest says nothing
  const char* parameter;
  bool per_channel;
  double start;
  float (*scale)(float parameter, int32_t quant_min, int32_t quant_max);
};

std::span<const FakeQuantRow> fake_quants();

// Words that a rule's searches work in. A composite rule runs any of them with its default options,
// and keeps their objectives there too.
int64_t work_words(int32_t rule, core::HistogramLayout layout, const core::Grid& grid,
                   const double* options);

}  // namespace torch_ext
