"""One model of the zoo, and how it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Arguments of the forward: positional and by keyword.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Entry(NamedTuple):
    """``name``: ``<group>/<model>``. ``make``: the model, with random weights, in any mode.

    ``inputs``: the arguments of its forward, made with torch's random numbers.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]


def image(size: int, batch: int = 2) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(batch, 3, size, size),), {})


def made(entry: Entry, seed: int = 0) -> nn.Module:
    """The model; parameters that begin at zero get values, so that what they do shows."""
    torch.manual_seed(seed)
    model = entry.make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not bool(parameter.any()) and parameter.numel():
                nn.init.normal_(parameter, std=0.02)
    return model.eval()


def inputs_of(entry: Entry, seed: int) -> Inputs:
    torch.manual_seed(seed + 1)
    return entry.inputs()


def tokens(count: int = 2, length: int = 12, vocabulary: int = 99) -> Tensor:
    return torch.randint(4, vocabulary, (count, length))
