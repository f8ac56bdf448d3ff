#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/state.h"
#include "cpu/capability.h"
#include "cuda/driver.h"
#include "rule_table.h"

// The pybind11 module, for what is no op: names and option tables of the registry, the state table,
// facts of the build.
namespace py = pybind11;

namespace torch_ext {
namespace {

py::dict option_dict(const core::Option& option) {
  py::dict row;
  py::tuple choices(option.choice_count);
  for (int32_t i = 0; i < option.choice_count; ++i) choices[i] = option.choices[i];
  row["name"] = option.name;
  if (option.choices != nullptr)
    row["default"] = option.choices[static_cast<int>(option.value)];
  else
    row["default"] = option.value;
  row["minimum"] = option.minimum;
  row["maximum"] = option.maximum;
  row["choices"] = choices;
  return row;
}

py::tuple observer_names() {
  py::tuple names(rules().size());
  for (size_t i = 0; i < rules().size(); ++i) names[i] = rules()[i].name;
  return names;
}

py::tuple method_names() {
  py::tuple names(fake_quants().size());
  for (size_t i = 0; i < fake_quants().size(); ++i) names[i] = fake_quants()[i].name;
  return names;
}

py::dict fake_quant_info(const std::string& name) {
  std::string known;
  for (const FakeQuantRow& method : fake_quants()) {
    if (name != method.name) {
      known += (known.empty() ? "" : ", ") + std::string(method.name);
      continue;
    }
    py::dict row;
    row["learned"] = method.learned >= 0;
    row["parameter"] = method.parameter;
    row["per_channel"] = method.learned < 0 || method.per_channel;
    row["start"] = method.start;
    return row;
  }
  throw py::value_error("unknown fake-quant \"" + name + "\"; known: " + known);
}

py::dict observer_info(const std::string& name) {
  std::string known;
  for (const RuleRow& rule : rules()) {
    if (name != rule.name) {
      known += (known.empty() ? "" : ", ") + std::string(rule.name);
      continue;
    }
    py::dict row;
    row["kind"] = rule.search_words != nullptr ? "search" : "closed";
    row["statistic"] = rule.needs == core::Needs::nothing   ? "none"
                       : rule.needs == core::Needs::extrema ? "extrema"
                                                            : "histogram";
    row["max_bits"] = rule.max_bits;
    row["only_integers"] = rule.only_integers != nullptr;
    py::list options;
    for (const core::Option& option : rule.options) options.append(option_dict(option));
    row["options"] = options;
    return row;
  }
  throw py::value_error("unknown observer \"" + name + "\"; known: " + known);
}

// The float formats by name, each with its bits, its largest value, and the step before that.
py::dict float_formats() {
  py::dict formats;
  for (const core::NamedFormat& entry : core::kFloatFormats) {
    py::dict row;
    row["bits"] = entry.format.bits;
    row["largest"] = entry.format.largest;
    const int32_t last = core::format_values(entry.format);
    row["last_step"] =
        core::format_value(entry.format, last) - core::format_value(entry.format, last - 1);
    formats[entry.name] = row;
  }
  return formats;
}

// The scales that a method quantizes with, for these values of its parameter, on integers or on the
// float format of a name.
std::vector<float> learned_scales(const std::string& name, const std::vector<float>& parameter,
                                  int32_t quant_min, int32_t quant_max, const std::string& format) {
  core::Codes codes{quant_min, quant_max};
  if (const core::NamedFormat* const entry = core::format_named(format))
    codes.format = entry->format;
  std::vector<float> scales;
  for (const FakeQuantRow& method : fake_quants())
    if (name == method.name && method.scale != nullptr)
      for (const float value : parameter) scales.push_back(method.scale(value, codes));
  return scales;
}

py::dict state_table() {
  py::dict table;
  for (const core::StateRow& row : core::kStates) {
    py::dict does;
    does["accumulate"] = row.accumulate;
    does["follow"] = row.follow;
    does["quantize"] = row.quantize;
    does["differentiate"] = row.differentiate;
    table[row.name] = does;
  }
  return table;
}

py::dict build_info() {
  py::dict info;
  info["version"] = TORCH_EXT_VERSION;
  info["torch"] = TORCH_EXT_TORCH_VERSION;
  info["cuda"] = cuda::available();
  info["cpu_capability"] = cpu::name_of(cpu::chosen());
  return info;
}

// (mantissa_bits, octaves) of the default statistic.
py::tuple default_layout(bool per_channel) {
  const core::HistogramLayout layout = per_channel ? core::kPerChannel : core::kPerTensor;
  return py::make_tuple(layout.mantissa_bits, layout.octaves);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("observers", &observer_names);
  m.def("fake_quants", &method_names);
  m.def("observer_info", &observer_info, py::arg("name"));
  m.def("fake_quant_info", &fake_quant_info, py::arg("name"));
  m.def("learned_scales", &learned_scales, py::arg("name"), py::arg("parameter"),
        py::arg("quant_min"), py::arg("quant_max"), py::arg("format") = "");
  m.def("float_formats", &float_formats);
  m.def("state_table", &state_table);
  m.def("default_layout", &default_layout, py::arg("per_channel"));
  m.def("build_info", &build_info);
}

}  // namespace torch_ext
