#include <ATen/core/stack.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "bindings/checks.h"
#include "bindings/recomputing.h"

// What torch does around its own in-place ops, for every op whose schema marks arguments as written
// to: it refuses tensors that must not be written to, and raises version counters, by which
// autograd finds that a tensor it saved was overwritten.
namespace torch_ext::bindings {
namespace {

void check_writable(const char* op, const char* argument, const at::Tensor& t) {
  // Outside of inference mode, counting a write to an inference tensor raises.
  if (t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  torch::autograd::check_inplace(t, t.requires_grad());
  // torch's in-place ops give the result a derivative; a range or a statistic has none.
  expect(!(at::GradMode::is_enabled() && t.requires_grad()), op, argument,
         "a tensor that does not require a gradient, because the op writes to it",
         "one that does; detach it, or call the op under torch.no_grad()");
}

void write(const c10::OperatorHandle& handle, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const std::string name = handle.schema().name().substr(sizeof("torch_ext::") - 1);
  const auto& arguments = handle.schema().arguments();
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::AliasInfo* const alias = arguments[i].alias_info();
    if (alias == nullptr || !alias->isWrite()) continue;
    written.push_back(torch::jit::peek(*stack, i, arguments.size()).toTensor());
    check_writable(name.c_str(), arguments[i].name().c_str(), written.back());
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    handle.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  // Activation checkpointing's second forward writes nothing, and what the first one's graph saved
  // is still to be used. merge_ is no part of a forward and always writes.
  if (recomputing() && name != "merge_") return;
  for (const at::Tensor& t : written) t.unsafeGetTensorImpl()->bump_version();
}

TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) {
  for (const char* op :
       {"observe_", "merge_", "follow_", "follow_fake_quant", "_follow_fake_quant_forward"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&write>());
}

}  // namespace
}  // namespace torch_ext::bindings
