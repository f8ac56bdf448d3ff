#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>
#include <utility>
#include <vector>

// Calls ops as any LibTorch program does: by schema, through the dispatcher.
namespace dispatch {

using c10::IValue;

// All results of an op, in order. Arguments beyond the given ones take the schema's defaults.
inline std::vector<IValue> call(const std::string& op, std::vector<IValue> arguments) {
  const c10::OperatorHandle handle =
      c10::Dispatcher::singleton().findSchemaOrThrow(("torch_ext::" + op).c_str(), "");
  const auto& wanted = handle.schema().arguments();
  for (size_t i = arguments.size(); i < wanted.size(); ++i)
    arguments.push_back(wanted[i].default_value().value());
  handle.callBoxed(arguments);
  return arguments;
}

inline at::Tensor tensor(const std::string& op, std::vector<IValue> arguments) {
  return call(op, std::move(arguments)).at(0).toTensor();
}

// The exception's message without its stack trace; empty if nothing is thrown.
inline std::string error(const std::string& op, std::vector<IValue> arguments) {
  try {
    call(op, std::move(arguments));
  } catch (const c10::Error& failure) {
    return failure.what_without_backtrace();
  } catch (const std::exception& failure) {
    return failure.what();
  }
  return "";
}

struct Rule {
  std::string name;
  std::vector<double> options;  // defaults, as solve takes them: a choice by its index
};

// A grid as ops take it.
inline std::string grid(int64_t quant_min, int64_t quant_max, bool symmetric,
                        bool power_of_two = false) {
  return "[" + std::to_string(quant_min) + "," + std::to_string(quant_max) +
         (symmetric ? "] symmetric" : "] affine") + (power_of_two ? " power_of_two" : "");
}

// The rules, found by the first arguments of their one-shot ops.
inline std::vector<Rule> rules() {
  constexpr const char* kFirst[] = {"x", "grid", "ch_axis"};
  std::vector<Rule> rules;
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind("torch_ext::", 0) != 0) continue;
    const auto& arguments =
        c10::Dispatcher::singleton().findSchemaOrThrow(name.name.c_str(), "").schema().arguments();
    bool is_rule = arguments.size() >= 3;
    for (size_t i = 0; is_rule && i < 3; ++i) is_rule = arguments[i].name() == kFirst[i];
    if (!is_rule) continue;
    Rule rule{name.name.substr(sizeof("torch_ext::") - 1), {}};
    for (size_t i = 3; i < arguments.size(); ++i) {
      const IValue& value = *arguments[i].default_value();
      rule.options.push_back(value.isDouble() ? value.toDouble() : 0);
    }
    rules.push_back(std::move(rule));
  }
  return rules;
}

struct State {
  at::Tensor extrema, tally, counts;
};

// An empty statistic in the default layouts.
inline State empty_state(int64_t channels = 1) {
  at::Tensor extrema = at::empty({channels, 2}, at::kFloat);
  extrema.select(1, 0).fill_(INFINITY);
  extrema.select(1, 1).fill_(-INFINITY);
  const int64_t octaves = channels == 1 ? 16 : 12, bins = channels == 1 ? 1024 : 128;
  return {extrema, at::zeros({channels, 5}, at::kLong),
          at::zeros({channels, 2, octaves, bins}, at::kLong)};
}

inline State observed(const at::Tensor& x, int64_t ch_axis = -1) {
  State state = empty_state(ch_axis < 0 ? 1 : x.size(ch_axis));
  call("observe_", {x, state.extrema, state.tally, state.counts, ch_axis});
  return state;
}

inline bool equal(const State& a, const State& b) {
  return at::equal(a.extrema, b.extrema) && at::equal(a.tally, b.tally) &&
         at::equal(a.counts, b.counts);
}

inline at::Tensor solve(const std::string& rule, const State& state, const std::string& grid,
                        std::vector<double> options) {
  return tensor("solve",
                {rule, state.extrema, state.tally, state.counts, grid, std::move(options)});
}

}  // namespace dispatch
