#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/backend.h"
#include "bindings/checks.h"
#include "bindings/recomputing.h"
#include "bindings/rules.h"

// Ops of quantization-aware training: a range that follows the batches, alone and with what is
// quantized by it.
namespace torch_ext::bindings {
namespace {

// Checked arguments.
struct Follow {
  Follow(const char* op, const at::Tensor& x, const at::Tensor& range, const at::Tensor& scale,
         const at::Tensor& zero_point, const at::Tensor& solved, double averaging_constant,
         c10::string_view rule, int64_t quant_min, int64_t quant_max, bool symmetric,
         c10::string_view scale_rule, bool power_of_two, at::ArrayRef<double> options,
         int64_t ch_axis, int64_t mantissa_bits, int64_t octaves);

  // What the op does to the range. `transient` is its batch's statistic.
  core::SolveJob job(const Transient& transient) const;
  bool frozen() const { return averaging_constant == 0; }
  uint8_t* solved_flag() const { return solved.mutable_data_ptr<uint8_t>(); }
  Transient transient() const { return {x, channels, needs_of(rule), layout}; }
  void run(const Backend& backend) const;

  const at::Tensor &x, &range, &scale, &zero_point, &solved;
  const double averaging_constant;
  const int64_t ch_axis;
  const at::ArrayRef<double> options;
  core::DType dtype;
  int64_t channels;
  int32_t rule;
  core::Grid grid;
  core::HistogramLayout layout;
};

Follow::Follow(const char* op, const at::Tensor& x, const at::Tensor& range,
               const at::Tensor& scale, const at::Tensor& zero_point, const at::Tensor& solved,
               double averaging_constant, c10::string_view rule_name, int64_t quant_min,
               int64_t quant_max, bool symmetric, c10::string_view scale_rule, bool power_of_two,
               at::ArrayRef<double> options, int64_t ch_axis, int64_t mantissa_bits,
               int64_t octaves)
    : x(x),
      range(range),
      scale(scale),
      zero_point(zero_point),
      solved(solved),
      averaging_constant(averaging_constant),
      ch_axis(ch_axis),
      options(options) {
  dtype = check_data(op, "x", x);
  channels = check_axis(op, x, ch_axis);
  check_range(op, range, channels, x.device());
  check_per_channel(op, "scale", scale, at::kFloat, channels, x.device());
  check_per_channel(op, "zero_point", zero_point, at::kInt, channels, x.device());
  check_per_channel(op, "solved", solved, at::kByte, 1, x.device());
  expect(averaging_constant >= 0 && averaging_constant <= 1, op, "averaging_constant",
         "between 0 and 1", averaging_constant);
  rule = check_rule(op, text(rule_name));
  grid = check_grid(op, quant_min, quant_max, symmetric, text(scale_rule), power_of_two);
  layout = check_layout(op, mantissa_bits, octaves);
  check_rule_use(op, rule, grid, layout, options.data(), static_cast<int64_t>(options.size()));
}

core::SolveJob Follow::job(const Transient& transient) const {
  return {rule,
          grid,
          options.data(),
          transient.statistic(),
          range.mutable_data_ptr<float>(),
          scale.mutable_data_ptr<float>(),
          zero_point.mutable_data_ptr<int32_t>(),
          solved_flag(),
          averaging_constant};
}

void Follow::run(const Backend& backend) const {
  if (recomputing() || (frozen() && !backend.is_cuda() && *solved_flag() != 0)) return;
  const Transient batch = transient();
  if (needs_of(rule) != core::Needs::nothing)
    backend.observe(view_of(x, dtype), ch_axis, batch.statistic(),
                    batch.mode(frozen() ? solved_flag() : nullptr));
  backend.solve({job(batch)});
}

void follow_(const at::Tensor& x, const at::Tensor& range, const at::Tensor& scale,
             const at::Tensor& zero_point, const at::Tensor& solved, double averaging_constant,
             c10::string_view rule, int64_t quant_min, int64_t quant_max, bool symmetric,
             c10::string_view scale_rule, bool power_of_two, at::ArrayRef<double> options,
             int64_t ch_axis, int64_t mantissa_bits, int64_t octaves) {
  constexpr const char* op = "follow_";
  const Follow follow(op, x, range, scale, zero_point, solved, averaging_constant, rule, quant_min,
                      quant_max, symmetric, scale_rule, power_of_two, options, ch_axis,
                      mantissa_bits, octaves);
  follow.run(Backend(op, x));
}

// The range follows x, and x is quantized with it. The second result is the packed mask, empty
// unless `with_mask`.
std::tuple<at::Tensor, at::Tensor> forward(
    const at::Tensor& x, const at::Tensor& range, const at::Tensor& scale,
    const at::Tensor& zero_point, const at::Tensor& solved, double averaging_constant,
    c10::string_view rule, int64_t quant_min, int64_t quant_max, bool symmetric,
    c10::string_view scale_rule, bool power_of_two, at::ArrayRef<double> options, int64_t ch_axis,
    int64_t mantissa_bits, int64_t octaves, c10::string_view mask, c10::string_view rounding,
    bool with_mask) {
  constexpr const char* op = "follow_fake_quant";
  const Follow follow(op, x, range, scale, zero_point, solved, averaging_constant, rule, quant_min,
                      quant_max, symmetric, scale_rule, power_of_two, options, ch_axis,
                      mantissa_bits, octaves);
  const c10::MaybeOwned<at::Tensor> data = x.expect_contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options());
  at::Tensor bits = at::empty({with_mask ? (x.numel() + 7) / 8 : 0}, x.options().dtype(at::kByte));
  const core::FakeQuantJob map{data->const_data_ptr(),
                               out.mutable_data_ptr(),
                               with_mask ? bits.mutable_data_ptr<uint8_t>() : nullptr,
                               channel_layout(x, ch_axis),
                               scale.const_data_ptr<float>(),
                               zero_point.const_data_ptr<int32_t>(),
                               static_cast<int32_t>(quant_min),
                               static_cast<int32_t>(quant_max),
                               parse_rounding(op, text(rounding)),
                               parse_mask(op, text(mask))};
  const Backend backend(op, x);
  if (!recomputing() && backend.follows_on_chip(follow.rule, follow.dtype, map)) {
    const Transient batch = follow.transient();
    backend.follow_on_chip(follow.job(batch), follow.dtype, map);
  } else {
    follow.run(backend);
    backend.fake_quant_forward(follow.dtype, map);
  }
  return {std::move(out), std::move(bits)};
}

at::Tensor follow_fake_quant(const at::Tensor& x, const at::Tensor& range, const at::Tensor& scale,
                             const at::Tensor& zero_point, const at::Tensor& solved,
                             double averaging_constant, c10::string_view rule, int64_t quant_min,
                             int64_t quant_max, bool symmetric, c10::string_view scale_rule,
                             bool power_of_two, at::ArrayRef<double> options, int64_t ch_axis,
                             int64_t mantissa_bits, int64_t octaves, c10::string_view mask,
                             c10::string_view rounding) {
  return std::get<0>(forward(x, range, scale, zero_point, solved, averaging_constant, rule,
                             quant_min, quant_max, symmetric, scale_rule, power_of_two, options,
                             ch_axis, mantissa_bits, octaves, mask, rounding, false));
}

void register_ops(torch::Library& m) {
  m.impl("follow_", TORCH_FN(follow_));
  m.impl("follow_fake_quant", TORCH_FN(follow_fake_quant));
  m.impl("_follow_fake_quant_forward", TORCH_FN(forward));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { register_ops(m); }

}  // namespace torch_ext::bindings
