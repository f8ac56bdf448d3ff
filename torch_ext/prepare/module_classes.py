"""Classes that ``prepare_qat`` derives for single modules: swapping, copying and pickling them.

Such a class derives from the module's original class, so names, types, hooks and checkpoints stay.
Pickle cannot import a derived class. It stores the module as an instance of the original class,
with the functions that derived the class from it, and calls these again when it loads the module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from torch_ext.prepare.module_calls.assigned_weights import set_attribute
from torch_ext.prepare.module_calls.recurrent_weights import forget_weights, read_weights_anew
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.folded_weight import WeightStep

M = TypeVar("M", bound=nn.Module)
Undo = Callable[[], None]
Forward = Callable[..., Any]
MakeClass = Callable[[type[nn.Module]], type[nn.Module]]

_MADE_BY = "_torch_ext_made_by"  # in the namespace of a class derived here: the MakeClass
_PARAMETRIZATIONS = "parametrizations"  # the child that torch adds
_OF_MODULES = ("_modules", "_parameters")  # attributes whose entries are not a module's own


def swap_class(module: nn.Module, make_class: MakeClass) -> Undo:
    """Replaces a module's class by ``make_class(class)``; returns the function that undoes it."""
    before = type(module)
    _set_class(module, make_class(before))
    return lambda: _set_class(module, before)


class _Detached(TorchFunctionMode):
    """Copies tensors that have a history of gradients, which torch refuses to, without it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = made = tensor.detach().clone()
            return made
        return func(*args, **(kwargs or {}))


def copied(who: str, model: M) -> M:
    """A deep copy of a model. Results that it holds in attributes are detached in the copy.

    A forward may have left them there, or ``torch.nn.utils.weight_norm``.

    Raises:
        TypeError: an attribute of a module cannot be copied; the message names it.
    """
    try:
        with _Detached():
            return copy.deepcopy(model)
    except Exception as error:  # what objects raise that are in the model
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if (why := _why_not_copied(value)) and key not in _OF_MODULES:
                    raise TypeError(
                        f"{who}: expected a model that copy.deepcopy can copy, got one with the "
                        f'attribute "{name}.{key}"'.replace('".', '"')
                        + f" ({type(value).__name__}: {why}); give its class a __deepcopy__, or "
                        "set the attribute after this call"
                    ) from error
        raise


def _why_not_copied(value: object) -> str:
    try:
        with _Detached():
            copy.deepcopy(value)
    except Exception as error:
        return str(error)
    return ""


def reduce_prepared(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """``__reduce_ex__`` of modules whose class was derived here or by ``parametrize``.

    Raises:
        RuntimeError: something other than quantizers parametrizes the module too.
    """
    kinds = type(module).__mro__
    original = next(kind for kind in kinds if not _is_made(kind))
    made_by = [vars(kind)[_MADE_BY].__func__ for kind in kinds if _MADE_BY in vars(kind)]
    state, weights = _plain_state(module)
    extra = (list(module._modules), weights, made_by[::-1])
    return _new_instance, (original,), (state, *extra), None, None, _restore


def swapped_below(module: nn.Module) -> bool:
    """Whether ``parametrize`` derived the module's class from one that was derived here."""
    kind, *bases = type(module).__mro__
    return _MADE_BY not in vars(kind) and any(_MADE_BY in vars(base) for base in bases)


def keeps_parametrizations(module: nn.Module) -> bool:
    """Whether the module has parametrizations other than quantizers."""
    return any(not _is_ours(step) for chain in _chains(module).values() for step in chain)


def restore_class(module: nn.Module) -> None:
    """Removes the quantizers from the module's weights, and restores its original class.

    ``parametrize.remove_parametrizations`` would change the derived class, which copies of the
    module share.
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
    """A subclass with another forward, named after its base, such as ``QuantizedResNet``.

    Args:
        base: the class to derive from.
        forward: the forward of the subclass.
        make_class: derives this class from a base; also called for copies, whose base may differ.
        prefix: what the subclass's name has before that of the base.
    """

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        # The base class may define __deepcopy__, as a GraphModule does.
        kind = type(self)
        _set_class(self, base)
        try:
            copied = copy.deepcopy(self, memo)
        finally:
            _set_class(self, kind)
            _forget_weights(self)
        # `kind` may be a class that parametrize derived from this one; the copy shares it.
        _set_class(copied, kind if type(copied) is base else make_class(type(copied)))
        _forget_weights(copied)
        return copied

    members = {
        "forward": forward,
        "__reduce_ex__": reduce_prepared,
        "__deepcopy__": deepcopy,
        "__module__": base.__module__,
        _MADE_BY: staticmethod(make_class),
    }
    derived = type(f"{prefix}{base.__name__}", (base,), members)
    return derived


def own_type(module: nn.Module) -> type[nn.Module]:
    """The module's original class: the first that was not derived to prepare or parametrize it."""
    return next(kind for kind in type(module).__mro__ if not _is_made(kind))


def parametrize_weight(module: nn.Module, parameter: str, step: nn.Module) -> None:
    """Appends ``step`` to the parametrizations of a parameter; the module stays picklable."""
    parametrize.register_parametrization(module, parameter, step, unsafe=True)
    # torch derived this class for this module alone.
    kind: Any = type(module)
    kind.__reduce_ex__ = reduce_prepared
    kind.__setattr__ = set_attribute
    chains = module.parametrizations
    assert isinstance(chains, nn.ModuleDict)
    chains.train(module.training)
    if isinstance(module, nn.RNNBase):
        read_weights_anew(module)


def _is_made(kind: type) -> bool:
    """Whether a class was derived for one module, here or by torch for its parametrizations."""
    # The module's regular classes, such as ParametrizationList, are its attributes.
    by_torch = parametrize.__name__ == kind.__module__ and not hasattr(parametrize, kind.__name__)
    return _MADE_BY in vars(kind) or by_torch


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _chains(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrizations of each of the module's tensors."""
    chains = module._modules.get(_PARAMETRIZATIONS)
    if not isinstance(chains, nn.ModuleDict):
        return {}
    return {n: c for n, c in chains.items() if isinstance(c, parametrize.ParametrizationList)}


def _forget_weights(module: nn.Module) -> None:
    """Empties what a recurrent module remembers of its parametrized weights."""
    if isinstance(module, nn.RNNBase) and _chains(module):
        forget_weights(module)


def _is_ours(step: nn.Module) -> bool:
    return isinstance(step, (FakeQuantize, WeightStep))


def _plain_state(module: nn.Module) -> tuple[dict[str, Any], dict[str, list[nn.Module]]]:
    """The module's ``__dict__`` without parametrizations, and the quantizing steps of each weight.

    Raises RuntimeError for parametrizations other than quantizers.
    """
    _forget_weights(module)
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
    # In torch's layers and their state dicts, weights come before biases.
    state["_parameters"] = originals | module._parameters
    state["_modules"] = {k: v for k, v in module._modules.items() if k != _PARAMETRIZATIONS}
    return state, weights


def _new_instance(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _restore(module: nn.Module, saved: tuple[Any, ...]) -> None:
    """Sets the state that :func:`reduce_prepared` saved, and derives the classes again."""
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
    for child in children:  # in their original order; parametrizations were just added last
        module._modules[child] = module._modules.pop(child)
