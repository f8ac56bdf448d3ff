#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "core/state.h"
#include "cpu/kernels.h"
#include "cuda/driver.h"
#include "registry.h"

// What an op cannot carry: names and option tables of the registry, the state table, facts of the build.
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

template <class R>
py::dict rule_dict() {
  py::dict row;
  row["kind"] = core::SearchRule<R> ? "search" : "closed";
  row["statistic"] = R::needs == core::Needs::nothing   ? "none"
                     : R::needs == core::Needs::extrema ? "extrema"
                                                        : "histogram";
  row["max_bits"] = static_cast<int>(R::max_bits);
  py::list options;
  for (int32_t i = 0; i < R::option_count; ++i) options.append(option_dict(R::options[i]));
  row["options"] = options;
  return row;
}

template <class L>
py::tuple names() {
  py::tuple all(L::size);
  L::for_each([&]<class T>(int32_t index) { all[index] = T::name; });
  return all;
}

py::dict observer_info(const std::string& name) {
  py::dict found;
  bool known = false;
  Observers::for_each([&]<class R>(int32_t) {
    if (name != R::name) return;
    known = true;
    found = rule_dict<R>();
  });
  if (known) return found;
  std::string message = "unknown observer \"" + name + "\"; known: ";
  Observers::for_each([&]<class R>(int32_t index) {
    if (index > 0) message += ", ";
    message += R::name;
  });
  throw py::value_error(message);
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
  info["cpu_capability"] = cpu::kernels().name;
  return info;
}

// (mantissa_bits, octaves) of the statistic kept unless asked otherwise.
py::tuple default_layout(bool per_channel) {
  const core::HistogramLayout layout = per_channel ? core::kPerChannel : core::kPerTensor;
  return py::make_tuple(layout.mantissa_bits, layout.octaves);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("observers", &names<Observers>);
  m.def("fake_quants", &names<FakeQuants>);
  m.def("observer_info", &observer_info, py::arg("name"));
  m.def("state_table", &state_table);
  m.def("default_layout", &default_layout, py::arg("per_channel"));
  m.def("build_info", &build_info);
}

}  // namespace torch_ext
