"""The quantizers of a model, under names that do not depend on its wrappers."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.folded_weight import FoldedWeight
from torch_ext.utils.arguments import bounded
from torch_ext.utils.text import shown

_COMPILED = "_orig_mod."
INPUTS = "input_quantizers"  # the child that holds the quantizers of a module's arguments
Pattern = str | Sequence[str]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled wrappers."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def check_model(who: str, model: object, argument: str = "model") -> nn.Module:
    """The unwrapped model; TypeError, naming the argument, for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: expected {argument} to be a torch.nn.Module, got {bounded(model)}")
    return unwrap(model)


def clean_name(name: str) -> str:
    """A module's name without the segments that compiling a part of the model adds."""
    return name.replace(_COMPILED, "")


def named_quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """The model's quantizers by name, each once: ``conv1.activation_quantizer``, ...

    Names are the same whether the model is wrapped (DataParallel, DistributedDataParallel,
    torch.compile) or not. A quantizer that is the model itself has the empty name. The mapping is
    new at each call; a float model gives an empty one.

    Raises TypeError for what is no module.
    """
    return {
        clean_name(name): module
        for name, module in check_model("named_quantizers", model).named_modules()
        if isinstance(module, FakeQuantize)
    }


class PreparedModel:
    """A prepared model as one call sees it: its quantizers and their weights, found once."""

    def __init__(self, who: str, model: object, argument: str = "model") -> None:
        """Raises TypeError for what is no module, ValueError for a model without quantizers."""
        self.who = who
        self.root = check_model(who, model, argument)
        self.quantizers = named_quantizers(self.root)
        if not self.quantizers:
            raise ValueError(
                f"{who}: expected {argument} to have quantizers, got none; call prepare_qat first"
            )

    @functools.cached_property
    def weights(self) -> dict[FakeQuantize, WeightSource]:
        """The source of every quantizer that is a parametrization."""
        return {
            module: WeightSource(owner, parameter, chain, i)
            for owner, parameter, chain in parametrizations(self.root)
            for i, module in enumerate(chain)
            if isinstance(module, FakeQuantize)
        }

    def read_weight(self, quantizer: FakeQuantize) -> Tensor | None:
        """What a weight's quantizer quantizes now; None for one that is no parametrization."""
        source = self.weights.get(quantizer)
        return None if source is None else source.read()

    def select(self, pattern: Pattern | None) -> dict[str, FakeQuantize]:
        """The quantizers that a pattern names; see :func:`select`."""
        return select(self.who, self.quantizers, pattern)


def select(
    who: str, quantizers: Mapping[str, FakeQuantize], pattern: Pattern | None
) -> dict[str, FakeQuantize]:
    """The quantizers that a pattern names, all for None.

    Raises TypeError for a pattern that is no text, ValueError for one that names no quantizer.
    """
    if pattern is None:
        return dict(quantizers)
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    for text in patterns:
        if not isinstance(text, str):
            raise TypeError(f"{who}: expected pattern to be text, got {bounded(text)}")
        if not any(fnmatch.fnmatchcase(name, text) for name in quantizers):
            raise ValueError(
                f'{who}: no quantizer matches pattern "{text}"; known: {shown(list(quantizers))}'
            )
    if not patterns:
        raise ValueError(f"{who}: expected pattern to name quantizers, got an empty list")
    return {
        name: quantizer
        for name, quantizer in quantizers.items()
        if any(fnmatch.fnmatchcase(name, text) for text in patterns)
    }


class WeightSource(NamedTuple):
    """Where a weight quantizer's input comes from."""

    owner: str
    parameter: str
    chain: parametrize.ParametrizationList
    position: int

    @torch.no_grad()
    def read(self) -> Tensor:
        """The input of the quantizer: the original through the parametrizations before it."""
        chain = self.chain
        if chain.is_tensor:
            values = [chain.original]
        else:
            values = [getattr(chain, f"original{i}") for i in range(chain.ntensors)]
        # FSDP2 leaves each rank a shard (a DTensor); this is the weight it computes with.
        values = [v.full_tensor() if hasattr(v, "full_tensor") else v for v in values]
        for i, before in enumerate(chain):
            if i == self.position:
                break
            # A FoldedWeight called leaves the weight alone while nothing is quantized.
            step = before.scaled if isinstance(before, FoldedWeight) else before
            values = [step(*values)]
        value: Tensor = values[0]
        return value.detach()


def parametrizations(
    root: nn.Module,
) -> Iterator[tuple[str, str, parametrize.ParametrizationList]]:
    """Owner's name, parameter's name and its parametrizations, for every parametrized tensor."""
    for name, module in root.named_modules():
        if parametrize.is_parametrized(module):
            chains = module.parametrizations
            assert isinstance(chains, nn.ModuleDict)
            for parameter, chain in chains.items():
                assert isinstance(chain, parametrize.ParametrizationList)
                yield clean_name(name), parameter, chain


def role_of(name: str, quantizer: FakeQuantize) -> str:
    """What a quantizer is of: ``"input"`` of the model, ``"output"`` or ``"weight"``."""
    if quantizer.transient:
        return "weight"
    return "input" if INPUTS in name.split(".") else "output"
