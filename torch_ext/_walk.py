"""Finding the quantizers of a model, under names that do not depend on its wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

from torch_ext._fold import FoldedWeight
from torch_ext.fake_quant import FakeQuantize

_COMPILED = "_orig_mod."


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled wrappers."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def check_model(who: str, model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: expected model to be a torch.nn.Module, got {model!r}")
    return unwrap(model)


def clean_name(name: str) -> str:
    """A module's name without the segments that compiling a part of the model adds."""
    return name.replace(_COMPILED, "")


def named_quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """Every quantizer once, by name: ``conv1.activation_quantizer``, ..."""
    return {
        clean_name(name): module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, FakeQuantize)
    }


def require_quantizers(who: str, model: nn.Module) -> dict[str, FakeQuantize]:
    found = named_quantizers(check_model(who, model))
    if not found:
        raise ValueError(
            f"{who}: expected model to have quantizers, got none; call prepare_qat first"
        )
    return found


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
    model: nn.Module,
) -> Iterator[tuple[str, str, parametrize.ParametrizationList]]:
    """Owner's name, parameter's name and its parametrizations, for every parametrized tensor."""
    for name, module in unwrap(model).named_modules():
        if parametrize.is_parametrized(module):
            chains = module.parametrizations
            assert isinstance(chains, nn.ModuleDict)
            for parameter, chain in chains.items():
                assert isinstance(chain, parametrize.ParametrizationList)
                yield clean_name(name), parameter, chain


def weight_sources(model: nn.Module) -> dict[FakeQuantize, WeightSource]:
    """The source of every quantizer that is a parametrization."""
    return {
        module: WeightSource(owner, parameter, chain, i)
        for owner, parameter, chain in parametrizations(model)
        for i, module in enumerate(chain)
        if isinstance(module, FakeQuantize)
    }
