#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "bindings/backend.h"
#include "bindings/contracts.h"
#include "bindings/exclusive.h"
#include "bindings/recomputing.h"
#include "bindings/rules.h"

// observe_ and merge_, which fill statistics, and the range of one tensor by a rule.
namespace torch_ext::bindings {

Transient::Transient(const at::Tensor& x, int64_t channels, core::Needs needs,
                     core::HistogramLayout kept)
    : layout(needs < core::Needs::counts ? core::HistogramLayout{} : kept),
      extrema(at::empty({channels, 2}, x.options().dtype(at::kFloat))),
      tally(at::empty({channels, core::kTallyColumns}, x.options().dtype(at::kLong))) {
  if (layout.octaves != 0)
    counts = at::empty({channels, layout.size()}, x.options().dtype(at::kLong));
  if (!x.is_cpu()) return;  // observe() in mode() takes the memory as empty
  float* const ends = extrema.mutable_data_ptr<float>();
  for (int64_t i = 0; i < 2 * channels; ++i)
    ends[i] = i % 2 == 0 ? std::numeric_limits<float>::infinity()
                         : -std::numeric_limits<float>::infinity();
  std::fill_n(tally.mutable_data_ptr<int64_t>(), tally.numel(), 0);
  if (counts.defined()) std::memset(counts.mutable_data_ptr(), 0, counts.nbytes());
}

cuda::ObserveMode Transient::mode(const uint8_t* unless) const {
  return extrema.is_cuda() ? cuda::ObserveMode{true, unless} : cuda::ObserveMode{};
}

core::Statistic Transient::statistic() const {
  return {extrema.mutable_data_ptr<float>(), tally.mutable_data_ptr<int64_t>(),
          counts.defined() ? counts.mutable_data_ptr<int64_t>() : nullptr, extrema.size(0), layout};
}

namespace {

void observe_(const at::Tensor& x, const at::Tensor& extrema, const at::Tensor& tally,
              const at::Tensor& counts, int64_t ch_axis) {
  const Observed checked = check_observe(x, extrema, tally, counts, ch_axis);
  if (recomputing()) return;
  const Exclusive exclusive(tally);
  Backend("observe_", x).observe(view_of(x, checked.dtype), ch_axis, checked.into);
}

void merge_(const at::Tensor& extrema, const at::Tensor& tally, const at::Tensor& counts,
            const at::Tensor& other_extrema, const at::Tensor& other_tally,
            const at::Tensor& other_counts) {
  const Merged checked =
      check_merge(extrema, tally, counts, other_extrema, other_tally, other_counts);
  const Exclusive exclusive(tally, other_tally);
  Backend("merge_", extrema).merge(checked.into, checked.from);
}

}  // namespace

at::Tensor solve_tensor(const OneShot& call) {
  const at::Tensor& x = call.x;
  const int64_t ch_axis = call.ch_axis, channels = call.channels.expect_int();
  const core::DType dtype = dtype_of(x);
  const Backend backend(rule_name(call.rule), x);
  at::Tensor range = at::empty({channels, 2}, x.options().dtype(at::kFloat));
  // The statistic of all channels of a large weight would take more memory than the weight, so it
  // is solved in slices of channels.
  constexpr int64_t kChannelsAtOnce = 512;
  for (int64_t begin = 0; begin < channels; begin += kChannelsAtOnce) {
    const int64_t count = std::min(kChannelsAtOnce, channels - begin);
    const at::Tensor part = ch_axis < 0 ? x : x.narrow(ch_axis, begin, count);
    const Transient transient(x, count, needs_of(call.rule), call.layout());
    const core::Statistic statistic = transient.statistic();
    if (needs_of(call.rule) != core::Needs::nothing)
      backend.observe(view_of(part, dtype), ch_axis, statistic, transient.mode(nullptr));
    const core::SolveJob job{call.rule,
                             call.grid,
                             call.options.data(),
                             statistic,
                             range.mutable_data_ptr<float>() + 2 * begin,
                             nullptr,
                             nullptr,
                             nullptr,
                             1};
    backend.solve({job});
  }
  return range;
}

}  // namespace torch_ext::bindings

namespace {

void register_ops(torch::Library& m) {
  m.impl("observe_", TORCH_FN(torch_ext::bindings::observe_));
  m.impl("merge_", TORCH_FN(torch_ext::bindings::merge_));
}

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { register_ops(m); }

}  // namespace
