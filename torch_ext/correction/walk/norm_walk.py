"""Walks a prepared model's batch norms in the order of their execution."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from torch_ext.correction.walk.data_walk import DataWalk
from torch_ext.quantizers.find import PreparedModel
from torch_ext.utils.batches import Forward


class NormCall:
    """One call of a batch norm, which goes on with the statistics that the norm has by then."""

    def __init__(self, name: str, x: Tensor) -> None:
        self.name = name
        self.input = x  # channels on axis 1

    #: Nothing is computed here.
    output = None

    def again(self) -> None: ...


class NormWalk(DataWalk[NormCall]):
    """A walk over the calls of batch norms; ``norms`` has them by name."""

    def __init__(
        self,
        prepared: PreparedModel,
        data: Any,
        norms: Mapping[str, _BatchNorm],
        *,
        forward: Forward | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Raises TypeError or ValueError for arguments of a wrong kind; see :class:`DataWalk`."""
        self.norms = dict(norms)
        super().__init__(prepared, data, list(norms), {}, forward, device)

    @contextlib.contextmanager
    def watched(self, at_call: Callable[[NormCall], Any]) -> Iterator[None]:
        """Calls ``at_call`` before each call of a norm."""
        with contextlib.ExitStack() as stack:
            for name, norm in self.norms.items():
                hook = functools.partial(_before, name, at_call)
                handle = norm.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield


def _before(
    name: str, at_call: Callable[[NormCall], Any], _: object, args: Any, kwargs: Any
) -> None:
    # A model prepared with an example looks at the functions that its forward calls; not at these.
    with torch._C.DisableTorchFunction():
        at_call(NormCall(name, args[0] if args else kwargs["input"]))
