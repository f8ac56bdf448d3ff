// Calibrates a LibTorch model with the ops of torch_ext, saves and trains it, and runs an
// AOTInductor package that Python made. Nothing here needs Python.
//   calibrate FOLDER    with model.pt2 and expected.pt of make_package.py; calibrated.pt is written
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <torch/serialize.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <numbers>

#include "quantizer.h"

namespace example {
namespace {

// ---- a model with quantizers --------------------------------------------------------------------
// One scale for each output channel, from the weight as it is.
QuantizerOptions weight_options(int64_t channels, int64_t bits) {
  QuantizerOptions options;
  options.quant_min = -(int64_t{1} << (bits - 1));
  options.quant_max = -options.quant_min - 1;
  options.ch_axis = 0;
  options.channels = channels;
  options.averaging_constant = 1.0;
  return options;
}

QuantizerOptions activation_options() {
  QuantizerOptions options;
  options.rule = "percentile";
  options.rule_options = {99.9};
  return options;
}

struct QuantConv2dImpl : torch::nn::Conv2dImpl {
  QuantConv2dImpl(torch::nn::Conv2dOptions options, int64_t bits)
      : Conv2dImpl(options),
        weight_quantizer(register_module(
            "weight_quantizer", Quantizer(weight_options(options.out_channels(), bits)))) {}
  Tensor forward(const Tensor& x) { return _conv_forward(x, weight_quantizer(weight)); }
  Quantizer weight_quantizer;
};
TORCH_MODULE(QuantConv2d);

struct QuantLinearImpl : torch::nn::LinearImpl {
  QuantLinearImpl(int64_t in, int64_t out, int64_t bits)
      : LinearImpl(in, out),
        weight_quantizer(
            register_module("weight_quantizer", Quantizer(weight_options(out, bits)))) {}
  Tensor forward(const Tensor& x) { return torch::linear(x, weight_quantizer(weight), bias); }
  Quantizer weight_quantizer;
};
TORCH_MODULE(QuantLinear);

struct NetImpl : torch::nn::Module {
  explicit NetImpl(int64_t weight_bits)
      : input(register_module("input", Quantizer(activation_options()))),
        conv1(register_module(
            "conv1", QuantConv2d(torch::nn::Conv2dOptions(1, 8, 3).padding(1), weight_bits))),
        relu1(register_module("relu1", Quantizer(activation_options()))),
        conv2(register_module(
            "conv2", QuantConv2d(torch::nn::Conv2dOptions(8, 8, 3).padding(1), weight_bits))),
        relu2(register_module("relu2", Quantizer(activation_options()))),
        fc(register_module("fc", QuantLinear(8, 4, weight_bits))) {}
  Tensor forward(Tensor x) {
    x = relu1(conv1(input(x)).relu());
    x = relu2(conv2(x).relu());
    return fc(x.mean({2, 3}));
  }
  Quantizer input;
  QuantConv2d conv1;
  Quantizer relu1;
  QuantConv2d conv2;
  Quantizer relu2;
  QuantLinear fc;
};
TORCH_MODULE(Net);

// The parameters of one net in another.
void copy_parameters(NetImpl& from, NetImpl& to) {
  torch::NoGradGuard no_grad;
  const auto target = to.named_parameters();
  for (const auto& item : from.named_parameters()) target[item.key()].copy_(item.value());
}

// ---- data and training --------------------------------------------------------------------------
struct Data {
  Tensor images, labels;
};

// Gratings in four directions, any phase, under noise: [count,1,16,16] and their direction.
Data make_data(int64_t count) {
  const Tensor labels = torch::randint(4, {count}, torch::kLong);
  const Tensor angle = labels.to(torch::kFloat).view({-1, 1, 1, 1}) * (std::numbers::pi / 4);
  const Tensor phase = torch::rand({count, 1, 1, 1}) * (2 * std::numbers::pi);
  const Tensor along = torch::arange(16, torch::kFloat);
  const Tensor wave = angle.cos() * along.view({1, 1, 16, 1}) + angle.sin() * along;
  return {(1.2 * wave + phase).sin() + 1.5 * torch::randn({count, 1, 16, 16}), labels};
}

void train(Net& net, const Data& data, int64_t steps, double rate) {
  torch::optim::Adam adam(net->parameters(), torch::optim::AdamOptions(rate));
  for (int64_t step = 0; step < steps; ++step) {
    const Tensor chosen = torch::randint(data.labels.size(0), {64}, torch::kLong);
    adam.zero_grad();
    torch::cross_entropy_loss(net(data.images.index({chosen})), data.labels.index({chosen}))
        .backward();
    adam.step();
  }
}

double accuracy(Net& net, const Data& data) {
  torch::NoGradGuard no_grad;
  return 100 * net(data.images).argmax(1).eq(data.labels).to(torch::kDouble).mean().item<double>();
}

void calibrate(Net& net, const Data& data) {
  torch::NoGradGuard no_grad;
  set_state(*net, CALIBRATION);
  for (const Tensor& images : data.images.split(64)) net(images);
  set_state(*net, VALIDATION);
}

void train_and_calibrate(const std::string& saved) {
  torch::manual_seed(0);
  const Data training = make_data(1024), test = make_data(1024);

  Net net(8);  // its quantizers are in FLOAT: they pass everything through
  train(net, training, 200, 1e-2);
  std::printf("float                         %6.2f %%\n", accuracy(net, test));

  calibrate(net, training);
  std::printf("INT8, calibrated              %6.2f %%   scale of the input %g\n",
              accuracy(net, test), net->input->scale.item<float>());

  // A LibTorch archive: parameters, and the buffers of every quantizer. Its state is not in it.
  torch::save(net, saved);
  Net read(8);
  torch::load(read, saved);
  set_state(*read, VALIDATION);
  const bool same = torch::equal(read(test.images), net(test.images));
  TORCH_CHECK(same, "expected the model in ", saved, " to compute the same, got other logits");
  std::printf("saved and read back           %6.2f %%   the same bits\n", accuracy(read, test));

  Net small(4);
  copy_parameters(*net, *small);
  calibrate(small, training);
  std::printf("INT4 weights, calibrated      %6.2f %%\n", accuracy(small, test));
  set_state(*small, QAT);
  train(small, training, 40, 3e-3);
  set_state(*small, VALIDATION);
  std::printf("INT4 weights, 40 steps of QAT %6.2f %%\n", accuracy(small, test));
}

// ---- what Python made ---------------------------------------------------------------------------
// A dict of tensors that Python's torch.save wrote.
c10::Dict<c10::IValue, c10::IValue> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "expected ", path, " to be a file that make_package.py wrote, got none");
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  return torch::pickle_load(bytes).toGenericDict();
}

void run_package(const std::string& folder) {
  torch::NoGradGuard no_grad;
  const auto expected = read_tensors(folder + "/expected.pt");
  const auto get = [&](const char* name) { return expected.at(name).toTensor(); };

  // The package holds a compiled model: its quantizers call the ops of the library linked here.
  torch::inductor::AOTIModelPackageLoader package(folder + "/model.pt2");
  const Tensors outputs = package.run({get("images")});
  TORCH_CHECK(torch::equal(outputs.at(0), get("quantized")),
              "expected the package's quantized images to be Python's bit for bit, got others");
  const double off = (outputs.at(1) - get("logits")).abs().max().item<double>();
  TORCH_CHECK(off <= 1e-5, "expected the package's logits to be Python's within 1e-5, got ", off);
  std::printf("package: quantized images are Python's bit for bit, logits within %.0e\n", off);

  // The same quantizer calibrated here, on the same images in another order, in other batches.
  Quantizer quantizer(activation_options());
  set_state(*quantizer, CALIBRATION);
  for (const Tensor& images : get("calibration").flip(0).split(7)) quantizer(images);
  set_state(*quantizer, VALIDATION);
  TORCH_CHECK(torch::equal(quantizer->scale, get("scale")) &&
                  torch::equal(quantizer->zero_point, get("zero_point")) &&
                  torch::equal(quantizer(get("images")), get("quantized")),
              "expected this Quantizer to find Python's scale, got ", quantizer->scale);
  std::printf("Quantizer: scale %g is Python's bit for bit, and so is what it quantizes\n",
              quantizer->scale.item<float>());
}

}  // namespace
}  // namespace example

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: calibrate FOLDER, which make_package.py has written\n");
    return 2;
  }
  try {
    const std::string folder = argv[1];
    example::run_package(folder);
    example::train_and_calibrate(folder + "/calibrated.pt");
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "calibrate: %s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "calibrate: %s\n", error.what());
    return 1;
  }
  return 0;
}
