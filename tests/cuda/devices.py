"""What is asked of a CUDA device; on the CPU, in a dry run, the nearest thing that can be asked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from host_reads import HostReads

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The bit pattern, on the CPU; every NaN has the same."""
    t = tensor.detach().cpu().contiguous()
    if not t.is_floating_point():
        return t
    return torch.where(t.isnan(), torch.full_like(t, torch.nan), t).view(
        _INTEGERS[t.element_size()]
    )


def assert_same_bits(have: Any, want: Any, *where: object) -> None:
    """Tensors, and lists, tuples and mappings of tensors; the sign of zero counts."""
    if isinstance(want, Tensor):
        assert have.dtype == want.dtype, where
        assert have.shape == want.shape, where
        if torch.equal(bits(have), bits(want)):
            return
        differs = bits(have) != bits(want)
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{where}: {int(differs.sum())} of {want.numel()} differ, first at {first}: "
            f"{have.cpu()[first].item()!r} for {want.cpu()[first].item()!r}"
        )
    if isinstance(want, Mapping):
        assert have.keys() == want.keys(), where
        for key in want:
            assert_same_bits(have[key], want[key], *where, key)
    elif isinstance(want, Sequence) and not isinstance(want, str):
        assert len(have) == len(want), where
        for i, (one, other) in enumerate(zip(have, want, strict=True)):
            assert_same_bits(one, other, *where, i)
    else:
        assert have == want, where


def to(value: Any, device: torch.device | str) -> Any:
    """Tensors, also in lists and mappings, on the device, with the strides they have."""
    if isinstance(value, Tensor):
        return _same_strides(value, device)
    if isinstance(value, dict):
        return {key: to(one, device) for key, one in value.items()}
    if isinstance(value, list):
        return [to(one, device) for one in value]
    return value


def _same_strides(value: Tensor, device: torch.device | str) -> Tensor:
    moved = value.detach().to(device, copy=True)
    if moved.stride() != value.stride() and value.numel() > 0:
        # `to` keeps only strides without gaps and repetitions.
        reach = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        memory = torch.zeros(reach, dtype=value.dtype, device=device)
        moved = memory.as_strided(value.shape, value.stride())
        source = value.detach().as_strided((reach,), (1,))
        memory.copy_(source)
    return moved.requires_grad_(value.requires_grad)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def no_sync(device: torch.device) -> Iterator[None]:
    """Inside, whatever makes the host wait for the device raises."""
    if device.type != "cuda":
        with HostReads():
            yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(device: torch.device, step: Callable[[], object]) -> Callable[[], object]:
    """A call that replays what `step` enqueues; capturing itself runs nothing."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = []  # the outputs live in the graph's memory
    with torch.cuda.graph(graph):
        kept.append(step())

    def replay() -> object:
        graph.replay()
        return kept[0]

    return replay


def warmed_up(device: torch.device, step: Callable[[], object], times: int = 3) -> None:
    """Runs a step before it is captured, on a stream of its own as Torch asks for."""
    if device.type != "cuda":
        step()
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(times):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.name().startswith("torch_ext::"):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def launches(device: torch.device, call: Callable[[], object]) -> list[str]:
    """Names of the kernels, copies and fills that a call runs; in a dry run, of our ops."""
    if device.type != "cuda":
        with _Calls() as calls:
            call()
        return calls.names
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities):  # the first one of a process may miss its beginning
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    with profile(activities=activities) as found:
        torch.cuda.synchronize(device)
        call()
        torch.cuda.synchronize(device)
    return [e.name for e in found.events() if e.device_type == DeviceType.CUDA]


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
