#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <memory>
#include <type_traits>

// Records ops in the autograd graph. torch::autograd::Function<T>::apply() does the same, but
// raises under torch.func and has no forward mode.
namespace torch_ext::bindings {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline bool records(const at::Tensor& t) {
  return at::GradMode::is_enabled() && t.defined() && t.requires_grad();
}

// The tangent of forward mode; undefined where t has none.
inline at::Tensor tangent_of(const at::Tensor& t) {
  return t.defined() ? t._fw_grad(/*level=*/0) : at::Tensor();
}

// t without its tangent. A tangent is computed from primals: it must not have one itself.
inline at::Tensor primal_of(const at::Tensor& t) {
  return tangent_of(t).defined() ? t._fw_primal(/*level=*/0) : t;
}

// Below autograd a tangent would be dropped without a word.
inline bool differentiates(const at::Tensor& t) { return records(t) || tangent_of(t).defined(); }

inline void set_tangent(const at::Tensor& t, const at::Tensor& tangent) {
  t._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

template <class Backward>
auto make_node() {
  using Node = torch::autograd::CppNode<Backward>;
  using Held = decltype(torch::autograd::Edge::function);
  // Releases before 2.13 hold nodes in a std::shared_ptr, whose deleter, found by the type of its
  // argument, releases a deep graph without recursion.
  if constexpr (std::is_same_v<Held, std::shared_ptr<torch::autograd::Node>>)
    return std::shared_ptr<Node>(new Node(), [](Node* node) { deleteNode(node); });
  else
    return c10::make_intrusive<Node>();
}

// Makes Backward::backward(context, gradients of `outputs`) give the gradients of `inputs`, of
// which some may be undefined. save(context) keeps what it needs. Where no input requires a
// gradient, nothing is recorded.
template <class Backward, class Save>
void record(const variable_list& inputs, const variable_list& outputs, const Save& save) {
  bool needed = false;
  for (const at::Tensor& input : inputs) needed = needed || records(input);
  if (!needed) return;
  const auto node = make_node<Backward>();
  variable_list defined;
  for (const at::Tensor& input : inputs) {
    node->is_variable_input_.push_back(input.defined());
    if (!input.defined()) continue;
    defined.push_back(input);
    node->input_info_.emplace_back(input);
  }
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(defined));
  node->clear_input_metadata();
  node->ctx_.set_materialize_grads(false);
  save(node->ctx_);
  for (const at::Tensor& output : outputs) {
    torch::autograd::set_history(output, node);
    node->output_info_.emplace_back(output);
  }
  node->save_variables_to_ctx();
}

// The kernels of the learned fake-quants, registered with the others.
void register_learned_autograd(torch::Library& m);

}  // namespace torch_ext::bindings
