"""Attaches quantizers to modules: to outputs by forward hooks, to weights by parametrizations.

A forward hook leaves a module's class, forward and name as they are, and works with any forward,
under ``torch.compile(fullgraph=True)`` and under ``torch.export``. It also keeps torch's
Transformer layers off their fused inference path, which would not call the submodules.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from torch_ext.prepare.module_calls.arguments import InputQuantizers
from torch_ext.prepare.module_calls.results import OutputQuantizers
from torch_ext.prepare.module_classes import Undo, parametrize_weight
from torch_ext.prepare.quantizable_modules import is_float_functional, is_out_proj
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import HookedWeight, WeightHook, computes_weight
from torch_ext.quantizers.transition import INPUTS, OUTPUTS
from torch_ext.utils.text import label_of

OUTPUT = "activation_quantizer"
SUFFIX = "_quantizer"  # ends the name of every quantizer that is a child; a number may follow
_FUNCTIONAL_OUTPUT = "activation_post_process"

_QUANTIZERS = (FakeQuantize, InputQuantizers, OutputQuantizers)
_CHILD = re.compile(rf"{SUFFIX}(_\d+)?$")


def attached(module: nn.Module) -> str | None:
    """The name of a quantizer that the module has already, within it; None if it has none."""
    for name in (INPUTS, OUTPUTS, OUTPUT, _FUNCTIONAL_OUTPUT):
        if isinstance(getattr(module, name, None), _QUANTIZERS):
            return name
    for name, child in module.named_children():
        if isinstance(child, FakeQuantize) and _CHILD.search(name):
            return name
    if parametrize.is_parametrized(module):
        chains = module.parametrizations
        assert isinstance(chains, nn.ModuleDict)
        for name, chain in chains.items():
            assert isinstance(chain, parametrize.ParametrizationList)
            if any(isinstance(step, FakeQuantize) for step in chain):
                return f"parametrizations.{name}"
    return None


def output_name(module: nn.Module) -> str:
    """The name that the quantizer of the module's output has within it."""
    return _FUNCTIONAL_OUTPUT if is_float_functional(module) else OUTPUT


def check_free(who: str, name: str, module: nn.Module, attribute: str) -> None:
    """Raises ValueError if the module has an attribute where a quantizer is to be attached."""
    taken = getattr(module, attribute, None)
    if taken is not None and not (
        attribute == _FUNCTIONAL_OUTPUT and isinstance(taken, nn.Identity)
    ):
        raise ValueError(
            f"{who}: expected {label_of(name)} to have no attribute {attribute}, got a "
            f"{type(taken).__name__}; rename it, or give the module qconfig=None"
        )


def check_weight(who: str, name: str, module: nn.Module, parameter: str) -> None:
    """Raises ValueError, with advice, for a weight that cannot be parametrized by a quantizer."""
    weight = getattr(module, parameter)
    where = f"{name}.{parameter}".strip(".")
    advice = "; give the module qconfig=None"
    if isinstance(weight, UninitializedParameter):
        raise ValueError(
            f"{who}: expected {where} to be initialised, got a lazy one; run a forward first"
        )
    if not (_is_parameter(module, parameter) or is_hooked(module, parameter)):
        kind = "a buffer" if parameter in module._buffers else "a plain attribute"
        raise ValueError(
            f"{who}: expected {where} to be a parameter, got {kind}; make it an nn.Parameter, or "
            "what computes it a parametrization (torch.nn.utils.parametrize), pass example_inputs, "
            "by which it is quantized where a forward of your own reads it, or give the module "
            "qconfig=None"
        )
    if not weight.is_floating_point() or weight.numel() == 0:
        kind = f"{weight.dtype} of shape {list(weight.shape)}"
        raise ValueError(
            f"{who}: expected {where} to be floating and not empty, got {kind}{advice}"
        )
    if getattr(module, "sparse", False) or getattr(module, "max_norm", None) is not None:
        raise ValueError(
            f"{who}: expected {where} to have dense gradients and no max_norm, got "
            f"sparse={module.sparse}, max_norm={module.max_norm}{advice}"
        )


def check_called(who: str, root: nn.Module, name: str, parameter: str) -> None:
    """Raises ValueError for a module whose hooks never run, as its parent does not call it."""
    parent = root.get_submodule(name.rpartition(".")[0]) if name else None
    if is_out_proj(parent, root.get_submodule(name)):
        raise ValueError(
            f"{who}: expected {name}.{parameter} to be a parameter, got one that a hook computes, "
            f"which never runs: {type(parent).__name__} reads it without calling {name}; make it "
            "a parameter (prune.remove, remove_weight_norm, remove_spectral_norm), or give "
            f"{name} qconfig=None"
        )


def is_hooked(module: nn.Module, parameter: str) -> bool:
    """Whether ``torch.nn.utils.weight_norm``, ``spectral_norm`` or ``prune`` computes a weight."""
    hooks = module._forward_pre_hooks.values()
    plain = isinstance(vars(module).get(parameter), Tensor)
    return plain and any(computes_weight(hook, parameter) for hook in hooks)


def _is_parameter(module: nn.Module, name: str) -> bool:
    return name in module._parameters or parametrize.is_parametrized(module, name)


def attach_hook(module: nn.Module, parameter: str, quantizer: FakeQuantize) -> Undo:
    """Quantizes a weight behind the hooks that compute it; returns the function that undoes it."""
    hook = WeightHook(parameter)
    undo_child = attach_child(module, hook.child, quantizer)
    handle = module.register_forward_pre_hook(hook)

    def undo() -> None:
        handle.remove()
        undo_child()

    return undo


def attach_weight(module: nn.Module, parameter: str, quantizer: nn.Module) -> Undo:
    """Appends a step to a weight's parametrizations; returns the function that undoes it."""
    order = list(module._parameters)  # removing a parametrization puts the parameter last
    # torch writes the weight's own values to it, which is no change that autograd has to know of.
    kept = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
    weights = tuple(module.parameters())
    with kept(weights):
        parametrize_weight(module, parameter, quantizer)
    chains = module.parametrizations
    assert isinstance(chains, nn.ModuleDict)

    def undo() -> None:
        chain = chains[parameter]
        assert isinstance(chain, parametrize.ParametrizationList)
        if len(chain) > 1:
            del chain[-1]
        else:
            with kept(weights):
                parametrize.remove_parametrizations(module, parameter, leave_parametrized=False)
            for name in order:
                module._parameters[name] = module._parameters.pop(name)

    return undo


def attach_child(module: nn.Module, name: str, quantizer: FakeQuantize) -> Undo:
    """Adds a quantizer that the plan of a forward calls; returns the function that undoes it."""
    module.add_module(name, quantizer.train(module.training))
    return lambda: delattr(module, name)


def attach_output(module: nn.Module, quantizer: FakeQuantize) -> Undo:
    """Quantizes a module's output from now on; returns the function that undoes it.

    A FloatFunctional calls its ``activation_post_process``, other modules get a forward hook.
    """
    quantizer.train(module.training)
    if is_float_functional(module):
        before = module.activation_post_process
        module.activation_post_process = quantizer
        return lambda: setattr(module, _FUNCTIONAL_OUTPUT, before)
    module.add_module(OUTPUT, quantizer)
    handle = module.register_forward_hook(_quantize_output)

    def undo() -> None:
        handle.remove()
        delattr(module, OUTPUT)

    return undo


def detach_children(module: nn.Module) -> None:
    """Removes a module's quantizers that are children, and the hooks that call them."""
    if is_float_functional(module):
        module.activation_post_process = nn.Identity()
    for key, pre_hook in list(module._forward_pre_hooks.items()):
        if isinstance(pre_hook, WeightHook):
            weight = HookedWeight("", pre_hook.parameter, module, pre_hook).read()
            setattr(module, pre_hook.parameter, weight)
            del module._forward_pre_hooks[key]
    for name, child in list(module.named_children()):
        if isinstance(child, _QUANTIZERS):
            delattr(module, name)
    hooks = module._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _quantize_output]:
        del hooks[key]


def _quantize_output(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of :func:`attach_output`."""
    quantizer = module.activation_quantizer
    # Attention returns a tuple: its output, and the attention weights.
    if type(output) is tuple and output:
        return (_quantize_output(module, args, output[0]), *output[1:])
    if isinstance(output, Tensor) and output.is_floating_point():
        return quantizer(output)  # type: ignore[operator]
    return output
