#include <torch/library.h>

#include <string>

#include "rule_table.h"

// The schemas of all ops. A rule's options are a float[] in the order of its option table; the
// Python package torch_ext.ops turns option names into that list. A grid is a text (grid_text.h).
namespace {

// The one-shot op of a rule: one tensor in, its range [C, 2] out, with the rule's options by name.
std::string one_shot_schema(const torch_ext::RuleRow& rule) {
  std::string schema =
      std::string(rule.name) + "(Tensor x, str grid=\"[-128,127] symmetric\", int ch_axis=-1";
  for (const torch_ext::core::Option& option : rule.options) {
    schema += option.choices != nullptr ? ", str " : ", float ";
    schema += option.name;
    schema += '=';
    if (option.choices != nullptr)
      schema.append(1, '"').append(option.choices[static_cast<int>(option.value)]).append(1, '"');
    else
      schema += std::to_string(option.value);
  }
  return schema + ") -> Tensor";
}

// The op that has the name of a method with a learned parameter; the parameter has the method's
// name for it.
std::string method_schema(const torch_ext::FakeQuantRow& method) {
  const bool per_channel = method.per_channel;
  return std::string(method.name) + "(Tensor x, Tensor " + method.parameter +
         (per_channel ? ", Tensor zero_point" : "") + ", str grid" +
         (per_channel ? ", int ch_axis=-1, bool use_grad_scaling=True, int batch_axis=-1" : "") +
         ") -> Tensor";
}

}  // namespace

TORCH_LIBRARY(torch_ext, m) {
  m.set_python_module("torch_ext.ops");
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  // Observers count values in any memory order, so a compiler need not copy their input to another
  // layout.
  const std::vector<at::Tag> any_layout = {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout};

  m.def(
      "fake_quant(Tensor x, Tensor scale, Tensor zero_point, str grid, int ch_axis=-1, "
      "str mask=\"rounded\") -> Tensor",
      tags);
  m.def(
      "_fake_quant_forward(Tensor x, Tensor scale, Tensor zero_point, str grid, int ch_axis=-1, "
      "str mask=\"rounded\", int[] order=[]) -> (Tensor, Tensor)",
      tags);
  m.def(
      "_fake_quant_backward(Tensor grad, Tensor mask, int[] order=[], bool by_last_axis=False) -> "
      "Tensor",
      tags);
  m.def(
      "dynamic_fake_quant(Tensor x, int group_size, str grid, Tensor? tensor_scale=None) -> Tensor",
      tags);
  m.def(
      "_dynamic_fake_quant_forward(Tensor x, int group_size, str grid, Tensor? tensor_scale=None, "
      "int[] order=[]) -> (Tensor, Tensor)",
      tags);

  const std::string learned =
      "Tensor x, str method, Tensor parameter, Tensor? zero_point, str grid, int ch_axis=-1, "
      "bool use_grad_scaling=True, int batch_axis=-1";
  m.def(("learned_fake_quant(" + learned + ") -> Tensor").c_str(), tags);
  m.def(("_learned_fake_quant_backward(Tensor grad, " + learned +
         ", bool of_x=True, bool of_parameters=True) -> (Tensor, Tensor, Tensor, Tensor)")
            .c_str(),
        tags);
  m.def(("_learned_fake_quant_tangent(Tensor? x_tangent, Tensor? parameter_tangent, "
         "Tensor? zero_point_tangent, Tensor? mixed_tangent, " +
         learned + ") -> Tensor")
            .c_str(),
        tags);
  for (const torch_ext::FakeQuantRow& method : torch_ext::fake_quants())
    if (method.learned >= 0) m.def(method_schema(method).c_str(), tags);

  m.def(
      "observe_(Tensor x, Tensor(a!) extrema, Tensor(b!) tally, Tensor(c!) counts, int ch_axis=-1) "
      "-> ()",
      any_layout);
  m.def(
      "merge_(Tensor(a!) extrema, Tensor(b!) tally, Tensor(c!) counts, Tensor other_extrema, "
      "Tensor other_tally, Tensor other_counts) -> ()",
      tags);
  m.def(
      "solve(str rule, Tensor extrema, Tensor tally, Tensor counts, str grid, float[] options=[]) "
      "-> "
      "Tensor",
      tags);
  m.def(
      "solve_many(str[] rules, Tensor[] extrema, Tensor[] tally, Tensor[] counts, str[] grids, "
      "float[] options) -> (Tensor[] range, Tensor[] scale, Tensor[] zero_point)",
      tags);
  m.def(
      "qparams(Tensor range, str grid, Tensor? tensor_scale=None) -> (Tensor scale, "
      "Tensor zero_point)",
      tags);
  // `follow`: how a range is moved towards those of the batches. `quantize`: what else the ops take
  // that also quantize x.
  const std::string follow =
      "(Tensor x, Tensor(a!) range, Tensor(b!) scale, Tensor(c!) zero_point, Tensor(d!) solved, "
      "float averaging_constant, str rule, str grid, float[] options=[], int ch_axis=-1, "
      "int mantissa_bits=10, int octaves=16";
  const std::string quantize = ", str mask=\"rounded\"";
  m.def(("follow_" + follow + ") -> ()").c_str(), any_layout);
  m.def(("follow_fake_quant" + follow + quantize + ") -> Tensor").c_str(), tags);
  m.def(("_follow_fake_quant_forward" + follow + quantize +
         ", bool with_mask=True, int[] order=[]) -> (Tensor, Tensor)")
            .c_str(),
        tags);
  m.def(
      "kl_threshold(Tensor counts, Tensor bin_width, int levels=128, str variant=\"slides\") -> "
      "(Tensor index, Tensor threshold)",
      tags);
  m.def("gptq(Tensor weight, Tensor factor, Tensor scale, Tensor zero_point, str grid) -> Tensor",
        tags);
  for (const torch_ext::RuleRow& rule : torch_ext::rules())
    m.def(one_shot_schema(rule).c_str(), tags);
}
