#include <torch/nn/modules/container/sequential.h>
#include <torch/serialize.h>

#include <cmath>
#include <cstdio>
#include <functional>
#include <sstream>

#include "quantizer.h"

// Prints what the states of a Quantizer do and what it refuses, a line each, for the test to
// compare.
namespace {

using namespace example;
using torch::nn::Sequential;

void refused(const char* what, const std::function<void()>& action) {
  std::string said = "nothing";
  try {
    action();
  } catch (const c10::Error& error) {
    said = error.what_without_backtrace();
  }
  std::printf("%s: %s\n", what, said.substr(0, said.find('\n')).c_str());
}

Tensor hash(const Quantizer& quantizer) {
  std::vector<Tensor> parts;
  for (const Tensor& buffer : quantizer->buffers())
    parts.push_back(buffer.to(torch::kDouble).nan_to_num().flatten());
  return torch::cat(parts);
}

void print(const char* what, const Tensor& values) {
  std::printf("%s:", what);
  const Tensor flat = values.to(torch::kDouble).flatten().contiguous();
  for (int64_t i = 0; i < flat.numel(); ++i) std::printf(" %.9g", flat.data_ptr<double>()[i]);
  std::printf("\n");
}

void states() {
  const Tensor x = torch::tensor({-1.0f, 0.3f, 3.0f, 0.0f});
  Quantizer quantizer;
  const Tensor untouched = hash(quantizer);
  print("float", quantizer(x));
  std::printf("float keeps: %d\n", torch::equal(hash(quantizer), untouched));

  set_state(*quantizer, CALIBRATION);
  print("calibration", quantizer(x));
  set_state(*quantizer, VALIDATION);
  print("range", quantizer->range);
  print("scale", quantizer->scale);
  print("tally", quantizer->tally);
  const Tensor before = hash(quantizer);
  print("validation", quantizer(x) / quantizer->scale);
  std::printf("validation keeps: %d\n", torch::equal(hash(quantizer), before));

  set_state(*quantizer, QAT);
  const Tensor wide = torch::tensor({-1.0f, 7.0f}).requires_grad_();
  quantizer(wide).sum().backward();
  print("qat range", quantizer->range);
  print("qat gradient", wide.grad());
}

void channels() {
  Quantizer quantizer(
      QuantizerOptions{.quant_min = -8, .quant_max = 7, .ch_axis = 1, .channels = 2});
  set_state(*quantizer, CALIBRATION);
  quantizer(torch::tensor({{-15.0f, 1.5f}, {3.0f, -3.0f}}));
  set_state(*quantizer, VALIDATION);
  print("channel scales", quantizer->scale);
}

void refusals() {
  Quantizer first, second;
  Sequential model(first, second);
  refused("no range", [&] { set_state(*model, VALIDATION); });
  set_state(*model, CALIBRATION);
  first(torch::ones({3}));
  refused("no data", [&] { set_state(*model, QAT); });
  std::printf("kept: %s %d\n", first->state()->name, first->solved.item<uint8_t>());
  refused("lone", [] { set_state(*Quantizer(), VALIDATION); });
  refused("non-finite only", [] {
    Quantizer quantizer;
    set_state(*quantizer, CALIBRATION);
    quantizer(torch::full({4}, NAN));
    set_state(*quantizer, VALIDATION);
  });
  refused("rule", [] { Quantizer(QuantizerOptions{.rule = "histogram"}); });
  refused("input", [] {
    Quantizer quantizer(QuantizerOptions{.ch_axis = 1, .channels = 3});
    set_state(*quantizer, CALIBRATION);
    quantizer(torch::ones({2, 4}));
  });

  // A file without ranges, read while in VALIDATION.
  Quantizer empty, ready;
  set_state(*ready, CALIBRATION);
  ready(torch::ones({3}));
  set_state(*ready, VALIDATION);
  std::stringstream file;
  torch::save(empty, file);
  torch::load(ready, file);
  std::printf("after load: %s\n", ready->state()->name);
  refused("loaded", [&] { set_state(*ready, VALIDATION); });
}

}  // namespace

int main() {
  states();
  channels();
  refusals();
}
