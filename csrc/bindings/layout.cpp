#include "bindings/layout.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/SymInt.h>

#include <algorithm>
#include <numeric>

namespace torch_ext::bindings {
namespace {

// While tracing, what depends on data is not known, and not asked for either.
bool is_true(const c10::SymBool& condition) { return TORCH_GUARD_OR_FALSE(condition); }

}  // namespace

std::vector<int64_t> order_of(const at::Tensor& x) {
  if (x.dim() < 2) return {};
  std::vector<int64_t> order(x.dim());
  std::iota(order.begin(), order.end(), 0);
  const auto is_one = [&](int64_t d) { return is_true(x.sym_size(d).sym_eq(1)); };
  for (const int64_t d : order)
    if (is_true(x.sym_stride(d).sym_eq(0)) && !is_one(d)) return {};
  // An axis of size 1 has a place too: torch tells memory formats by its stride.
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    if (is_true(x.sym_stride(a).sym_eq(x.sym_stride(b)))) return !is_one(a) && is_one(b);
    return is_true(x.sym_stride(a).sym_gt(x.sym_stride(b)));
  });
  if (std::is_sorted(order.begin(), order.end())) return {};
  return order;
}

at::IntArrayRef order_by_last_axis(at::IntArrayRef order, int64_t axes) {
  return !order.empty() && order.back() == axes - 1 ? order : at::IntArrayRef();
}

at::Tensor empty_in(at::IntArrayRef order, const at::Tensor& x) {
  if (order.empty()) return at::empty_symint(x.sym_sizes(), x.options());
  std::vector<c10::SymInt> sizes;
  std::vector<int64_t> axes(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    sizes.push_back(x.sym_size(order[i]));
    axes[order[i]] = static_cast<int64_t>(i);
  }
  return at::empty_symint(sizes, x.options()).permute(axes);
}

at::Tensor with_strides_of(const at::Tensor& like, const at::Tensor& t) {
  bool same = true;
  for (int64_t d = 0; d < t.dim(); ++d)
    same = same && (t.size(d) == 1 || t.stride(d) == like.stride(d));
  if (same || t.numel() == 0) return t;
  at::Tensor copy = at::empty_strided(like.sizes(), like.strides(), t.options());
  copy.copy_(t);
  return copy;
}

core::ChannelLayout channel_layout(const at::Tensor& dense, int64_t ch_axis) {
  const int64_t numel = dense.numel();
  if (ch_axis < 0) return {1, 1, numel};
  const int64_t channels = dense.size(ch_axis);
  if (channels == 1) return {1, 1, numel};
  if (numel == 0) return {0, channels, 1};
  const int64_t inner = dense.stride(ch_axis);
  return {numel / (channels * inner), channels, inner};
}

}  // namespace torch_ext::bindings
