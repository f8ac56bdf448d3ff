"""Folds batch norms into the convolution or linear layer before them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from torch_ext.prepare.batch_norms.fold import fold
from torch_ext.prepare.batch_norms.look_alikes import look_alikes
from torch_ext.prepare.batch_norms.observed import observed_norms
from torch_ext.prepare.batch_norms.pair import (
    LAYERS,
    Norms,
    Pair,
    all_norms,
    has_own_forward,
    pair_of,
    problem,
)
from torch_ext.prepare.batch_norms.traced import traced_norms
from torch_ext.prepare.batch_norms.verify import verified
from torch_ext.prepare.insertion.record_runs import examples_of, record_modes
from torch_ext.prepare.module_classes import copied
from torch_ext.quantizers.find import check_model, named_quantizers
from torch_ext.utils.arguments import bounded, split_arguments
from torch_ext.utils.text import label_of

_WHO = "fuse"
M = TypeVar("M", bound=nn.Module)


def fuse(
    model: M,
    pairs: Iterable[Sequence[str]] | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
) -> M:
    """Folds batch norms into the convolution or linear layer before them; run before prepare_qat.

    The result computes what the model computes in eval mode, up to rounding. A folded batch norm is
    replaced by an ``Identity``, so names and indices stay. If its module applies an activation too
    (timm's ``BatchNormAct2d``), what replaces it does that, under the same names.

    With ``example_inputs``, the model runs on them in eval mode, and each batch norm that alone
    reads the output of a layer is folded, whatever the classes of the two; then the outputs are
    compared, and a pair that changes them is not folded. Without, only what is certain is folded:
    pairs of torch's own layers in a symbolic trace of the forward (``torch.fx``), or, if it cannot
    be traced, those that are consecutive in a ``Sequential``.

    Args:
        model: a float model.
        pairs: names of a layer and its batch norm, such as ``[("conv1", "bn1")]``; folds no others.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; or a list
            of such tuples or mappings, for a forward that goes several ways.
        inplace: change ``model``; by default, a copy is changed and returned.

    Returns:
        The model with folded batch norms.

    Raises:
        TypeError: ``model`` is no module, or a pair is not two names.
        ValueError: the model is prepared already; a given pair cannot be folded, names no module
            or a module of another pair; or the model does not run on the example.

    Warns:
        UserWarning: batch norms were left as they are; once, with all names and reasons.
    """
    check_model(_WHO, model)
    if quantizers := named_quantizers(model):
        raise ValueError(
            f"{_WHO}: expected a float model, got one that is prepared already "
            f'("{next(iter(quantizers))}"); fuse before prepare_qat'
        )
    names = None if pairs is None else _check_names(model, pairs)
    norms = _find(model, names, example_inputs)
    fused = model if inplace else copied(_WHO, model)
    for pair in norms.pairs:
        fold(fused, pair)
    if names is None:
        warn_of_left(_WHO, norms.left, has_example=example_inputs is not None)
    return fused


def find_norms(who: str, model: nn.Module, example_inputs: Any) -> Norms:
    """The pairs in runs of the examples, and why other batch norms are in none."""
    if not _has_norms(model):
        return Norms([], {})
    recordings = record_modes(who, model, example_inputs, lambda _: False, modes=(False,))
    return observed_norms(recordings)


def warn_of_left(who: str, left: Mapping[str, str], has_example: bool) -> None:
    """One warning, at the line that called the caller, with the norms that were not folded."""
    if not left:
        return
    names: dict[str, list[str]] = {}
    for name, why in left.items():
        names.setdefault(why, []).append(label_of(name))
    text = "; ".join(f"{', '.join(some)} ({why})" for why, some in names.items())
    if not has_example:
        text += "; pass example_inputs, to find what is folded in a run of the model"
    warnings.warn(f"{who}: batch norms left as they are: {text}", stacklevel=3)


def _has_norms(model: nn.Module) -> bool:
    return bool(all_norms(model) or look_alikes(model))


def _find(model: nn.Module, names: list[tuple[str, str]] | None, example_inputs: Any) -> Norms:
    """What to fold, and why not the rest; raises ValueError for given pairs that cannot be."""
    if example_inputs is None:
        if names is None:
            return traced_norms(model) if _has_norms(model) else Norms([], {})
        return Norms([_given(model, layer, norm) for layer, norm in names], {})
    norms = find_norms(_WHO, model, example_inputs)
    examples = [split_arguments(_WHO, given) for given in examples_of(example_inputs)]
    if names is None:
        return verified(model, norms, examples)
    wanted = Norms([pair for pair in norms.pairs if (pair.layer, pair.norm) in names], norms.left)
    wanted = verified(model, wanted, examples)
    followed = {pair.norm: f"the layer before it is {pair.layer}" for pair in norms.pairs}
    for layer, norm in names:
        if (layer, norm) not in [(pair.layer, pair.norm) for pair in wanted.pairs]:
            why = wanted.left.get(norm) or followed.get(norm) or f"{norm} is no batch norm"
            raise ValueError(f"{_WHO}: cannot fold {norm} into {layer}: {why}")
    return wanted


def _check_names(model: nn.Module, pairs: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """The given pairs; raises TypeError or ValueError if they are not pairs of modules' names."""
    modules = dict(model.named_modules())
    names: list[tuple[str, str]] = []
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(n, str) for n in pair):
            raise TypeError(f"{_WHO}: expected pairs of two names, got {bounded(pair)}")
        for name in pair:
            if name not in modules:
                raise ValueError(f'{_WHO}: no module is named "{name}"')
        names.append((pair[0], pair[1]))
    for side in zip(*names, strict=True):
        if len(set(side)) != len(side):
            twice = next(name for name in side if side.count(name) > 1)
            raise ValueError(f"{_WHO}: {twice} is in two pairs")
    return names


def _given(model: nn.Module, layer: str, norm: str) -> Pair:
    """A given pair, if nothing but the forward can be against it; raises ValueError."""
    pair = pair_of(model, layer, norm)
    if not isinstance(model.get_submodule(layer), LAYERS):
        why = f"{layer} is a {type(model.get_submodule(layer)).__name__}"
    elif not (why := problem(model, pair)) and has_own_forward(model.get_submodule(norm)):
        kind = type(model.get_submodule(norm)).__name__
        why = f"{norm} is a {kind}, which has a forward of its own; pass example_inputs too"
    if why:
        raise ValueError(f"{_WHO}: cannot fold {norm} into {layer}: {why}")
    return pair
