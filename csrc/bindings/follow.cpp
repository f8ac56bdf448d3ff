#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/arguments.h"
#include "bindings/backend.h"
#include "bindings/contracts.h"
#include "bindings/exclusive.h"
#include "bindings/layout.h"
#include "bindings/recomputing.h"
#include "bindings/rules.h"

// Ops of quantization-aware training: follow_ moves a range towards the ranges of the batches,
// follow_fake_quant also quantizes the batch with it.
namespace torch_ext::bindings {
namespace {

// An op's arguments, checked.
struct Follow {
  Follow(const char* op, const FollowArguments& arguments)
      : a(arguments),
        contract(check_follow(op, arguments)),
        channels(contract.channels.expect_int()) {
    // Gives a range that is a lazy clone its memory, by whose address threads exclude each other.
    a.range.mutable_data_ptr();
  }

  // The statistic of this batch, empty at first.
  Transient statistic() const { return {a.x, channels, needs_of(contract.rule), contract.layout}; }
  // Solves the rule from the batch's statistic and moves range, scale and zero point in place.
  core::SolveJob job(const Transient& statistic) const;
  // Whether the range is known to stay as it is.
  bool stays(const Backend& backend) const {
    return recomputing() || (frozen() && !backend.is_cuda() && *solved_flag() != 0);
  }
  // Observes the batch and solves, unless the range stays.
  void run(const Backend& backend) const;
  // With averaging_constant 0 the range stays what the first batch made it that was not all zero.
  bool frozen() const { return a.averaging_constant == 0; }
  uint8_t* solved_flag() const { return a.solved.mutable_data_ptr<uint8_t>(); }

  const FollowArguments& a;
  const FollowContract contract;
  const int64_t channels;
};

core::SolveJob Follow::job(const Transient& statistic) const {
  return {contract.rule,
          contract.grid,
          a.options.data(),
          statistic.statistic(),
          a.range.mutable_data_ptr<float>(),
          a.scale.mutable_data_ptr<float>(),
          a.zero_point.mutable_data_ptr<int32_t>(),
          solved_flag(),
          a.averaging_constant};
}

void Follow::run(const Backend& backend) const {
  if (stays(backend)) return;
  const Transient batch = statistic();
  if (needs_of(contract.rule) != core::Needs::nothing)
    backend.observe(view_of(a.x, contract.dtype), a.ch_axis, batch.statistic(),
                    batch.mode(frozen() ? solved_flag() : nullptr));
  backend.solve({job(batch)});
}

void follow_(const FollowArguments& arguments) {
  constexpr const char* op = "follow_";
  const Follow follow(op, arguments);
  const Exclusive exclusive(arguments.range);
  follow.run(Backend(op, arguments.x));
}

// x quantized with the range that has followed it, and the packed mask: uint8
// [(numel + 7) / 8] in the order of memory, or [0] without `with_mask`.
std::tuple<at::Tensor, at::Tensor> quantized(const FollowArguments& a, at::IntArrayRef order) {
  constexpr const char* op = "follow_fake_quant";
  const Follow follow(op, a);
  at::Tensor out = empty_in(order, a.x);
  const at::Tensor data = with_strides_of(out, a.x);
  at::Tensor bits =
      at::empty({a.with_mask ? (a.x.numel() + 7) / 8 : 0}, a.x.options().dtype(at::kByte));
  // The job below writes to scale and zero point. A lazy clone gets memory of its own when a
  // pointer to write through is asked for, so the one to read through must not be older.
  const core::FakeQuantJob map{data.const_data_ptr(),
                               out.mutable_data_ptr(),
                               a.with_mask ? bits.mutable_data_ptr<uint8_t>() : nullptr,
                               channel_layout(out, a.ch_axis),
                               a.scale.mutable_data_ptr<float>(),
                               a.zero_point.mutable_data_ptr<int32_t>(),
                               follow.contract.grid,
                               follow.contract.rounding,
                               follow.contract.mask};
  const Exclusive exclusive(a.range);
  const Backend backend(op, a.x);
  if (!follow.stays(backend) &&
      backend.follows_on_chip(follow.contract.rule, follow.contract.dtype, map)) {
    const Transient batch = follow.statistic();
    backend.follow_on_chip(follow.job(batch), follow.contract.dtype, map);
  } else {
    follow.run(backend);
    backend.fake_quant_forward(follow.contract.dtype, map);
  }
  return {std::move(out), std::move(bits)};
}

std::tuple<at::Tensor, at::Tensor> forward(const FollowArguments& arguments) {
  return quantized(arguments, arguments.order);
}

at::Tensor follow_fake_quant(const FollowArguments& arguments) {
  return std::get<0>(quantized(arguments, order_of(arguments.x)));
}

void register_ops(torch::Library& m) {
  impl<FollowOp, follow_>(m);
  impl<FollowFakeQuantOp, follow_fake_quant>(m);
  impl<FollowForwardOp, forward>(m);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { register_ops(m); }

}  // namespace torch_ext::bindings
