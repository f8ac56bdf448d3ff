"""The largest and least values of channels, over data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_ext.correction.equalization.scale_sites import ScaleSite, largest_by_channel
from torch_ext.utils.batches import Forward, to_device
from torch_ext.utils.modes import eval_mode, forked_rng
from torch_ext.utils.progress import progress_bar


class ChannelData(NamedTuple):
    """By site: ``largest``, the largest magnitude of each channel, and ``least``, its least value.

    Sites that a module neither makes nor reads are in neither, those that no module makes not in
    ``least``, and those that the data does not reach in neither.
    """

    largest: dict[str, Tensor]
    least: dict[str, Tensor]


@torch.no_grad()
def channel_data(
    who: str,
    model: nn.Module,
    sites: Mapping[str, ScaleSite],
    data: Iterable[Any],
    forward: Forward,
    device: torch.device,
    progress: bool | None,
) -> ChannelData:
    """Runs the model, in eval mode and as it is, over the data.

    Raises ValueError for no data, and for values that are not finite.
    """
    found = ChannelData({}, {})
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(forked_rng(model))
        for site in sites.values():
            for handle in _hooks(who, model, site, found):
                stack.callback(handle.remove)
        total = len(data) if hasattr(data, "__len__") else None  # type: ignore[arg-type]
        count = 0
        for batch in progress_bar(data, total, who, progress):
            forward(model, to_device(batch, device))
            count += 1
    if count == 0:
        raise ValueError(f"{who}: expected data to give batches, got none")
    return found


def _hooks(who: str, model: nn.Module, site: ScaleSite, found: ChannelData) -> list[Any]:
    """Hooks at the modules that read a site's value, or else at the one that makes it."""
    handles = []
    readers = [read for read in site.reads if read.node.op == "call_module"]
    own = torch.arange(1, site.channels + 1)
    for read in readers:
        note = _note(who, site, found, read.channels, read.layer.axis)
        handles.append(_before(model.get_submodule(read.layer.name), note))
    if site.module:
        note = _note(who, site, found, None if readers else own, site.axis, least=True)
        handles.append(_behind(model.get_submodule(site.module), note))
    return handles


def _before(module: nn.Module, note: Callable[[Any], None]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(args[0] if args else kwargs["input"])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _behind(module: nn.Module, note: Callable[[Any], None]) -> Any:
    def hook(_: nn.Module, args: Any, output: Any) -> None:
        note(output)

    return module.register_forward_hook(hook)


def _note(
    who: str,
    site: ScaleSite,
    found: ChannelData,
    channels: Tensor | None,
    axis: int,
    least: bool = False,
) -> Callable[[Any], None]:
    """A function that takes a value into account; ``channels``: of its places, for the largest."""

    def note(value: Tensor) -> None:
        places = value.detach().movedim(axis, 0).flatten(1)
        if places.numel() == 0:
            return
        if not bool(places.isfinite().all()):
            raise ValueError(
                f"{who}: expected data with which all values are finite, got others behind "
                f"{site.name}"
            )
        if channels is not None:
            sizes = places.abs().amax(1).double()
            sizes = largest_by_channel(sizes, channels.to(sizes.device), site.channels)
            known = found.largest.get(site.name, sizes)
            found.largest[site.name] = torch.maximum(known, sizes)
        if least:
            low = places.amin(1).double()
            found.least[site.name] = torch.minimum(found.least.get(site.name, low), low)

    return note
