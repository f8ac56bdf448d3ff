"""ceilings.cu, compiled when first needed and called on Torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

import native
from case import Missing, Run

Result = TypeVar("Result")

SOURCE = "gpu/ceilings.cu"
WAYS = {"persistent blocks": 0, "a block per tile": 1, "a block per tile, streaming": 2}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TILE_BYTES = 1 << 16  # what a block moves at once; buffers are multiples of it


def compiler() -> str | None:
    """nvcc: of CUDA_HOME, in PATH, or where the toolkit installs itself."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else []
    folders += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def build(arch: str = "native") -> Path:
    """The library for one architecture, such as ``sm_90``; by default that of this machine."""
    nvcc = compiler()
    if nvcc is None:
        raise Missing("nvcc is not installed")
    flags = ("-std=c++17", "-O3", f"-arch={arch}", "-shared", "-Xcompiler=-fPIC,-Wall,-Wextra")
    return native.compiled(SOURCE, [nvcc, *flags], _device_key(arch))


def _device_key(arch: str) -> list[str]:
    """`native` means another machine code on another device."""
    return [torch.cuda.get_device_name()] if arch == "native" else []


@functools.cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build()))
    loaded.error_text.restype = ctypes.c_char_p
    return loaded


def _call(function: str, *arguments: object) -> None:
    found = getattr(library(), function)(*arguments)
    if found != 0:
        raise RuntimeError(f"{function}: {library().error_text(found).decode()}")


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def ceilings(kind: str, xs: list[Tensor]) -> dict[str, Run]:
    """Ways to ``read`` the buffers, to ``copy`` them, or to ``2r1w``: read two and write one.

    Each call takes the next buffer; the fastest way is the ceiling. As many bytes are read as a
    buffer has, whatever its dtype.
    """
    size = xs[0].numel() * xs[0].element_size()
    if size % TILE_BYTES:
        raise ValueError(f"expected a multiple of {TILE_BYTES} bytes, got {size}")
    calls: dict[str, Callable[[int], Run]] = {
        "read": functools.partial(_read, xs, size),
        "copy": functools.partial(_copy, xs, size),
        "2r1w": functools.partial(_mix, xs, size),
    }
    if kind not in calls:
        raise ValueError(f"expected kind to be one of {', '.join(calls)}, got {kind}")
    return {f"{kind}, {name}": calls[kind](way) for name, way in WAYS.items()}


def _bytes(size: int) -> ctypes.c_int64:
    return ctypes.c_int64(size)


def _read(xs: list[Tensor], size: int, way: int) -> Run:
    sink = torch.empty(1, dtype=torch.int32, device=xs[0].device)

    def run(x: Tensor) -> None:
        _call("ceiling_read", _pointer(x), _bytes(size), _pointer(sink), way, _stream())

    return rotating([functools.partial(run, x) for x in xs])


def _copy(xs: list[Tensor], size: int, way: int) -> Run:
    def run(x: Tensor) -> Tensor:
        out = torch.empty_like(x)  # as the ops do
        _call("ceiling_copy", _pointer(x), _pointer(out), _bytes(size), way, _stream())
        return out

    return rotating([functools.partial(run, x) for x in xs])


def _mix(xs: list[Tensor], size: int, way: int) -> Run:
    other = torch.empty_like(xs[0])

    def run(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        arguments = (_pointer(x), _pointer(y), _pointer(out), _bytes(size), way, _stream())
        _call("ceiling_mix", *arguments)
        return out

    seconds = [*xs[1:], xs[0]] if len(xs) > 1 else [other]
    return rotating([functools.partial(run, x, y) for x, y in zip(xs, seconds, strict=True)])


def cub_histogram(xs: list[Tensor], bins: int, low: float, high: float) -> Callable[[], Tensor]:
    """CUB's HistogramEven with the range given; counts are int32, as its examples have them."""
    counts = torch.zeros(bins, dtype=torch.int32, device=xs[0].device)
    needed = ctypes.c_size_t(0)

    def call(x: Tensor, scratch: ctypes.c_void_p) -> Tensor:
        _call(
            "cub_histogram",
            _pointer(x),
            DTYPES[x.dtype],
            ctypes.c_int64(x.numel()),
            ctypes.c_float(low),
            ctypes.c_float(high),
            bins,
            _pointer(counts),
            scratch,
            ctypes.byref(needed),
            _stream(),
        )
        return counts

    call(xs[0], ctypes.c_void_p(None))  # says how much scratch it needs
    memory = torch.empty(needed.value, dtype=torch.uint8, device=xs[0].device)
    return rotating([functools.partial(call, x, _pointer(memory)) for x in xs])


def rotating(runs: Sequence[Callable[[], Result]]) -> Callable[[], Result]:
    """A call that runs the next one each time: what fits the cache is not there any more."""
    position = -1

    def run() -> Result:
        nonlocal position
        position = (position + 1) % len(runs)
        return runs[position]()

    return run
