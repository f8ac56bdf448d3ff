"""How quantizers hang on modules: children run by hooks, and parametrizations of weights.

Forward hooks leave a module's class, forward and name alone, work for any forward code, under
``torch.compile(fullgraph=True)`` and ``torch.export``, and keep the fused inference paths of
torch's Transformer layers, which would not call the submodules, switched off.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from torch_ext.prepare.input_quantizers import InputQuantizers
from torch_ext.prepare.module_classes import Undo, parametrize_weight
from torch_ext.prepare.quantizable_modules import is_float_functional
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import INPUTS

OUTPUT = "activation_quantizer"
SUFFIX = "_quantizer"  # of every quantizer that is a child, less a number
_FUNCTIONAL_OUTPUT = "activation_post_process"

_CHILD = re.compile(rf"{SUFFIX}(_\d+)?$")


def attached(module: nn.Module) -> str | None:
    """The name under which a module carries quantizers already."""
    for name in (INPUTS, OUTPUT, _FUNCTIONAL_OUTPUT):
        if isinstance(getattr(module, name, None), (FakeQuantize, InputQuantizers)):
            return name
    for name, child in module.named_children():
        if isinstance(child, FakeQuantize) and _CHILD.search(name):
            return name
    if parametrize.is_parametrized(module):
        chains = module.parametrizations
        assert isinstance(chains, nn.ModuleDict)
        for name, chain in chains.items():
            assert isinstance(chain, parametrize.ParametrizationList)
            if any(isinstance(one, FakeQuantize) for one in chain):
                return f"parametrizations.{name}"
    return None


def output_name(module: nn.Module) -> str:
    return _FUNCTIONAL_OUTPUT if is_float_functional(module) else OUTPUT


def check_free(who: str, name: str, module: nn.Module, attribute: str) -> None:
    taken = getattr(module, attribute, None)
    if taken is not None and not (
        attribute == _FUNCTIONAL_OUTPUT and isinstance(taken, nn.Identity)
    ):
        raise ValueError(
            f'{who}: expected "{name}" to have no attribute {attribute}, '
            f"got a {type(taken).__name__}"
        )


def check_weight(who: str, name: str, module: nn.Module, parameter: str) -> None:
    """Refuses a weight that a parametrization would break, with what to do about it."""
    weight = getattr(module, parameter)
    where = f"{name}.{parameter}".strip(".")
    advice = "; give the module qconfig=None"
    if isinstance(weight, UninitializedParameter):
        raise ValueError(
            f"{who}: expected {where} to be initialised, got a lazy one; run a forward first"
        )
    if parameter not in module._parameters and not parametrize.is_parametrized(module, parameter):
        raise ValueError(
            f"{who}: expected {where} to be a parameter, got a {type(weight).__name__} that "
            f"something else writes (an old-style weight norm?){advice}"
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


def attach_weight(module: nn.Module, parameter: str, quantizer: nn.Module) -> Undo:
    order = list(module._parameters)
    parametrize_weight(module, parameter, quantizer)
    chains = module.parametrizations
    assert isinstance(chains, nn.ModuleDict)

    def undo() -> None:
        chain = chains[parameter]
        assert isinstance(chain, parametrize.ParametrizationList)
        if len(chain) > 1:
            del chain[-1]
        else:
            parametrize.remove_parametrizations(module, parameter, leave_parametrized=False)
            for name in order:
                module._parameters[name] = module._parameters.pop(name)

    return undo


def attach_child(module: nn.Module, name: str, quantizer: FakeQuantize) -> Undo:
    """Adds a quantizer that a captured forward calls."""
    module.add_module(name, quantizer.train(module.training))
    return lambda: delattr(module, name)


def attach_output(module: nn.Module, quantizer: FakeQuantize) -> Undo:
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
    """Removes the quantizers that hang on a module as children, and the hook that runs one."""
    if is_float_functional(module):
        module.activation_post_process = nn.Identity()
    for name, child in list(module.named_children()):
        if isinstance(child, (FakeQuantize, InputQuantizers)):
            delattr(module, name)
    hooks = module._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _quantize_output]:
        del hooks[key]


def _quantize_output(module: nn.Module, args: Any, output: Any) -> Any:
    quantizer = module.activation_quantizer
    # Attention returns its weights beside the output.
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return (quantizer(output[0]), *output[1:])  # type: ignore[operator]
    if isinstance(output, Tensor) and output.is_floating_point():
        return quantizer(output)  # type: ignore[operator]
    return output
