"""Classes that ``prepare_qat`` makes for single modules: swapping, copying and pickling them.

Such a class derives from the one that the module had, so names, types, hooks and checkpoints stay.
A module is pickled as an instance of the class that it had before it was prepared, by what can be
found under its name; what was made of it is made again when it is read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.folded_weight import FoldedWeight

Undo = Callable[[], None]
Forward = Callable[..., Any]
MakeClass = Callable[[type[nn.Module]], type[nn.Module]]

_MADE_BY = "_torch_ext_made_by"  # in the namespace of a class that was made here
_PARAMETRIZATIONS = "parametrizations"  # the child that torch adds


def swap_class(module: nn.Module, make_class: MakeClass) -> Undo:
    """Swaps the module's class for the one made of it; returns what undoes it."""
    before = type(module)
    _set_class(module, make_class(before))
    return lambda: _set_class(module, before)


def reduce_prepared(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """``__reduce_ex__`` of modules whose class was made here or by ``parametrize``."""
    kinds = type(module).__mro__
    original = next(kind for kind in kinds if not _is_made(kind))
    made_by = [vars(kind)[_MADE_BY].__func__ for kind in kinds if _MADE_BY in vars(kind)]
    state, weights = _plain_state(module)
    extra = (list(module._modules), weights, made_by[::-1])
    return _new_instance, (original,), (state, *extra), None, None, _restore


def swapped_below(module: nn.Module) -> bool:
    """Whether ``parametrize`` derived the module's class from one that was made here."""
    kind, *bases = type(module).__mro__
    return _MADE_BY not in vars(kind) and any(_MADE_BY in vars(base) for base in bases)


def keeps_parametrizations(module: nn.Module) -> bool:
    """Whether something else than quantizers is a parametrization of the module."""
    return any(not _is_ours(step) for chain in _chains(module).values() for step in chain)


def restore_class(module: nn.Module) -> None:
    """Takes the quantizers off the module's weights, and gives it the class back that it had.

    By hand, because torch's removal changes the class, which copies of the module share.
    """
    if keeps_parametrizations(module):
        for chain in _chains(module).values():
            for position in reversed(range(len(chain))):
                if _is_ours(chain[position]) and len(chain) > 1:
                    del chain[position]
                elif _is_ours(chain[position]):
                    chain[position] = nn.Identity()
        kinds = type(module).__mro__
        _set_class(module, next(kind for kind in kinds if _MADE_BY not in vars(kind)))
        return
    state, _ = _plain_state(module)
    module.__dict__.update(state)
    _set_class(module, own_type(module))


def class_with_forward(
    base: type[nn.Module],
    forward: Forward,
    make_class: MakeClass,
    prefix: str = "Quantized",
) -> type[nn.Module]:
    """A class with another forward, named after its base, such as ``QuantizedResNet``.

    Args:
        make_class: makes the class of a copy, which may have another base.
        prefix: of its name.
    """

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        # The base class may copy in a way of its own (a GraphModule: what its graph calls).
        kind = type(self)
        _set_class(self, base)
        try:
            made = copy.deepcopy(self, memo)
        finally:
            _set_class(self, kind)
        # One that torch derived from this one, for parametrizations, serves the copy as well.
        _set_class(made, kind if type(made) is base else make_class(type(made)))
        return made

    members = {
        "forward": forward,
        "__reduce_ex__": reduce_prepared,
        "__deepcopy__": deepcopy,
        "__module__": base.__module__,
        _MADE_BY: staticmethod(make_class),
    }
    swapped = type(f"{prefix}{base.__name__}", (base,), members)
    return swapped


def own_type(module: nn.Module) -> type[nn.Module]:
    """The module's class, without those that preparing it put before."""
    return next(kind for kind in type(module).__mro__ if not _is_made(kind))


def parametrize_weight(module: nn.Module, parameter: str, step: nn.Module) -> None:
    """Lets ``step`` compute the parameter, behind the steps that it has already."""
    parametrize.register_parametrization(module, parameter, step, unsafe=True)
    # The class is this module's own, which torch made.
    type(module).__reduce_ex__ = reduce_prepared  # type: ignore[method-assign, assignment]
    chains = module.parametrizations
    assert isinstance(chains, nn.ModuleDict)
    chains.train(module.training)


def _is_made(kind: type) -> bool:
    """Whether a class was made for one module, here or by torch for its parametrizations."""
    # Those of the module itself (ParametrizationList) can be found in it by their names.
    home = parametrize.__name__ == kind.__module__ and not hasattr(parametrize, kind.__name__)
    return _MADE_BY in vars(kind) or home


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _chains(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrizations of each of the module's tensors."""
    chains = module._modules.get(_PARAMETRIZATIONS)
    if not isinstance(chains, nn.ModuleDict):
        return {}
    return {n: c for n, c in chains.items() if isinstance(c, parametrize.ParametrizationList)}


def _is_ours(step: nn.Module) -> bool:
    return isinstance(step, (FakeQuantize, FoldedWeight))


def _plain_state(module: nn.Module) -> tuple[dict[str, Any], dict[str, list[nn.Module]]]:
    """The module's ``__dict__`` without parametrizations, and the steps that compute each weight.

    Raises RuntimeError where something else is parametrized too.
    """
    state = module.__dict__.copy()
    weights: dict[str, list[nn.Module]] = {}
    originals: dict[str, Any] = {}
    for name, chain in _chains(module).items():
        weights[name] = list(chain)
        for step in weights[name]:
            if not _is_ours(step):
                raise RuntimeError(
                    f"pickle: expected {name} of a {own_type(module).__name__} to have quantizers "
                    f"alone, got a {type(step).__name__}; save state_dict() and load it into "
                    "prepare_qat of a new float model"
                )
        originals[name] = chain.original
    # Weights come before biases in torch's layers, and so in their state dicts.
    state["_parameters"] = originals | module._parameters
    state["_modules"] = {k: v for k, v in module._modules.items() if k != _PARAMETRIZATIONS}
    return state, weights


def _new_instance(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _restore(module: nn.Module, saved: tuple[Any, ...]) -> None:
    state: dict[str, Any]
    children: list[str]
    weights: Mapping[str, list[nn.Module]]
    made_by: list[MakeClass]
    state, children, weights, made_by = saved
    module.__setstate__(state)  # type: ignore[no-untyped-call]
    for make_class in made_by:
        swap_class(module, make_class)
    for name, steps in weights.items():
        for step in steps:
            parametrize_weight(module, name, step)
    for child in children:  # registered last, but not called last
        module._modules[child] = module._modules.pop(child)
