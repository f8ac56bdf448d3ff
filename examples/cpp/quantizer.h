#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch_ext/core/histogram.h>
#include <torch_ext/core/state.h>
#include <torch_ext/registry.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

// A quantizer as a LibTorch module, and the change of state of a whole model: what
// torch_ext.FakeQuantize and torch_ext.set_fake_quantize are in Python, in a small form.
namespace example {

using torch::Tensor;

// ---- ops ---------------------------------------------------------------------------------------
// A signature that is not the registered one is an error where the op is first looked up.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

// A grid is a text: "[-128,127] symmetric", "[0,255] affine".
using Text = std::string_view;
using ObserveOp = void(const Tensor& x, const Tensor& extrema, const Tensor& tally,
                       const Tensor& counts, int64_t ch_axis);
using FakeQuantOp = Tensor(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                           Text grid, int64_t ch_axis, Text mask);
using FollowOp = Tensor(const Tensor& x, const Tensor& range, const Tensor& scale,
                        const Tensor& zero_point, const Tensor& solved, double averaging_constant,
                        Text rule, Text grid, at::ArrayRef<double> options, int64_t ch_axis,
                        int64_t mantissa_bits, int64_t octaves, Text mask);
using Tensors = std::vector<Tensor>;
using SolveOp = std::tuple<Tensors, Tensors, Tensors>(const std::vector<std::string>& rules,
                                                      at::TensorList extrema, at::TensorList tally,
                                                      at::TensorList counts,
                                                      const std::vector<std::string>& grids,
                                                      at::ArrayRef<double> options);

// ---- states ------------------------------------------------------------------------------------
// A state is a row of the library's own table, which says what a quantizer does in it.
using State = const torch_ext::core::StateRow*;

consteval State find_state(Text name) {
  for (const torch_ext::core::StateRow& row : torch_ext::core::kStates)
    if (name == row.name) return &row;
  throw "no such state";
}

inline constexpr State CALIBRATION = find_state("calibration");
inline constexpr State QAT = find_state("qat");
inline constexpr State VALIDATION = find_state("validation");
inline constexpr State FLOAT = find_state("float");

// ---- the quantizer -----------------------------------------------------------------------------
struct QuantizerOptions {
  std::string rule = "min_max";
  int64_t quant_min = -128;
  int64_t quant_max = 127;
  bool symmetric = true;
  int64_t ch_axis = -1;  // -1: one scale for the whole tensor
  int64_t channels = 1;  // with ch_axis: its size
  double averaging_constant = 0.01;
  std::vector<double> rule_options = {};  // in the order of its table; empty: the defaults
};

// A rule of the registry: what it reads, and the defaults of its options.
struct RuleFacts {
  torch_ext::core::Needs needs;
  std::vector<double> defaults;
};

inline RuleFacts find_rule(const std::string& rule) {
  std::optional<RuleFacts> found;
  std::string known;
  torch_ext::Observers::for_each_on_host([&]<class R>(int32_t) {
    known += std::string(known.empty() ? "" : ", ") + R::name;
    if (rule != R::name) return;
    found = RuleFacts{R::needs, {}};
    for (int32_t i = 0; i < R::option_count; ++i) found->defaults.push_back(R::options[i].value);
  });
  TORCH_CHECK_VALUE(found, "Quantizer: unknown rule \"", rule, "\"; known: ", known);
  return *found;
}

class QuantizerImpl : public torch::nn::Module {
 public:
  explicit QuantizerImpl(QuantizerOptions wanted = {}) : options(std::move(wanted)) {
    const RuleFacts facts = find_rule(options.rule);
    if (options.rule_options.empty()) options.rule_options = facts.defaults;
    grid = "[" + std::to_string(options.quant_min) + "," + std::to_string(options.quant_max) +
           (options.symmetric ? "] symmetric" : "] affine");
    layout = options.ch_axis < 0 ? torch_ext::core::kPerTensor : torch_ext::core::kPerChannel;
    const bool histogram = facts.needs >= torch_ext::core::Needs::counts;
    const int64_t c = options.channels;
    const int64_t octaves = histogram ? layout.octaves : 0;
    const int64_t bins = histogram ? int64_t{1} << layout.mantissa_bits : 0;
    extrema = register_buffer("extrema", torch::empty({c, 2}));
    tally = register_buffer("tally", torch::zeros({c, 5}, torch::kLong));
    counts = register_buffer("counts", torch::zeros({c, 2, octaves, bins}, torch::kLong));
    range = register_buffer("range", torch::zeros({c, 2}));
    scale = register_buffer("scale", torch::ones({c}));
    zero_point = register_buffer("zero_point", torch::zeros({c}, torch::kInt));
    solved = register_buffer("solved", torch::zeros({1}, torch::kByte));
    extrema.select(1, 0).fill_(INFINITY);  // nothing seen: an empty interval
    extrema.select(1, 1).fill_(-INFINITY);
  }

  Tensor forward(const Tensor& x) {
    if (state_->accumulate) {
      static const auto observe = find_op<ObserveOp>("torch_ext::observe_");
      observe.call(x, extrema, tally, counts, options.ch_axis);
    }
    if (!state_->quantize) return x;
    if (state_->follow) {
      static const auto follow = find_op<FollowOp>("torch_ext::follow_fake_quant");
      return follow.call(x, range, scale, zero_point, solved, options.averaging_constant,
                         options.rule, grid, options.rule_options, options.ch_axis,
                         layout.mantissa_bits, layout.octaves, "rounded");
    }
    static const auto fake_quant = find_op<FakeQuantOp>("torch_ext::fake_quant");
    return fake_quant.call(x, scale, zero_point, grid, options.ch_axis, "rounded");
  }

  State state() const { return state_; }
  // Unchecked: set_state below solves and checks, for a quantizer as for a model.
  void enter(State state) { state_ = state; }

  // What was read may have no range: set_state is to look at it.
  void load(torch::serialize::InputArchive& archive) override {
    torch::nn::Module::load(archive);
    state_ = FLOAT;
  }

  QuantizerOptions options;
  std::string grid;  // of options, as the ops take it
  torch_ext::core::HistogramLayout layout;
  Tensor extrema, tally, counts;            // the statistic
  Tensor range, scale, zero_point, solved;  // solved: whether there is a range

 private:
  State state_ = FLOAT;
};
TORCH_MODULE(Quantizer);

// ---- the state of a model ----------------------------------------------------------------------
struct Solutions {
  std::vector<QuantizerImpl*> quantizers;
  Tensors range, scale, zero_point;
};

// Solves the statistics of all quantizers in one call; changes nothing.
inline Solutions solve(std::vector<QuantizerImpl*> quantizers) {
  if (quantizers.empty()) return {};  // an op without a tensor has no device
  std::vector<std::string> rules, grids;
  Tensors extrema, tally, counts;
  std::vector<double> options;
  for (const QuantizerImpl* q : quantizers) {
    rules.push_back(q->options.rule);
    extrema.push_back(q->extrema);
    tally.push_back(q->tally);
    counts.push_back(q->counts);
    grids.push_back(q->grid);
    options.insert(options.end(), q->options.rule_options.begin(), q->options.rule_options.end());
  }
  Solutions found{std::move(quantizers), {}, {}, {}};
  std::tie(found.range, found.scale, found.zero_point) =
      find_op<SolveOp>("torch_ext::solve_many").call(rules, extrema, tally, counts, grids, options);
  return found;
}

// Sets the state of all quantizers in a model, or of one quantizer. Leaving CALIBRATION solves, and
// throws with the names of those that saw no data; VALIDATION throws with the names of those that
// have no range. A refused change changes nothing.
inline void set_state(torch::nn::Module& model, State state) {
  std::vector<QuantizerImpl*> all, leaving;
  std::string unobserved, without;
  for (const auto& item : model.named_modules("", true)) {
    auto* const quantizer = item.value()->as<QuantizerImpl>();
    if (quantizer == nullptr) continue;
    const std::string name = " " + (item.key().empty() ? quantizer->name() : item.key());
    all.push_back(quantizer);
    const bool seen = quantizer->tally.select(1, 0).sum().item<int64_t>() > 0;
    if (quantizer->state() == CALIBRATION && state != CALIBRATION) {
      if (seen)
        leaving.push_back(quantizer);
      else
        unobserved += name;
    } else if (state == VALIDATION && quantizer->solved.item<uint8_t>() == 0) {
      without += name;
    }
  }
  TORCH_CHECK(unobserved.empty(),
              "set_state: expected every quantizer to have seen data, got none for", unobserved,
              "; run data through them first");
  TORCH_CHECK(without.empty(),
              "set_state: expected every quantizer to have a range for VALIDATION, got none for",
              without, "; calibrate, train or load first");

  torch::NoGradGuard no_grad;
  const Solutions found = solve(std::move(leaving));
  for (size_t i = 0; i < found.quantizers.size(); ++i) {
    found.quantizers[i]->range.copy_(found.range[i]);
    found.quantizers[i]->scale.copy_(found.scale[i]);
    found.quantizers[i]->zero_point.copy_(found.zero_point[i]);
    found.quantizers[i]->solved.fill_(1);
  }
  for (QuantizerImpl* const quantizer : all) quantizer->enter(state);
}

}  // namespace example
