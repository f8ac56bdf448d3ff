"""The two C++ files of this folder, compiled when first needed and called without a copy."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
OUTPUT = FOLDER / "output"
PREFETCH_AHEAD = 1024  # floats
# -march=native: in the peer's favour, the package's own kernels are compiled for fixed targets.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wall", "-Wextra")


def cpu_model() -> str:
    """The processor's name, for the record of a result."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def compiled(name: str, command: Sequence[str], key: Sequence[str] = ()) -> Path:
    """The library that ``command`` makes of ``name``, anew when source, command or key differ."""
    source = FOLDER / name
    text = "\n".join([source.read_text(), *command, platform.machine(), *key])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    library = OUTPUT / f"{source.stem}-{digest}.so"
    if not library.is_file():
        OUTPUT.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        whole = [*command, str(source), "-o", str(unfinished)]
        done = subprocess.run(whole, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"cannot compile {source.name}:\n{done.stderr}")
        unfinished.replace(library)
    return library


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The library made from ``name``, compiled anew when source, flags or machine differ.

    Torch is loaded by now, so ``-fopenmp`` resolves to Torch's own thread pool: a second pool
    spinning beside it would cost milliseconds per call.
    """
    machine = [line for line in _cpuinfo() if line.startswith(("flags", "Features"))][:1]
    return ctypes.CDLL(str(compiled(name, [compiler(), *FLAGS], machine)))


def ceilings(kind: str, x: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to ``read`` x, or to ``copy`` it to memory of its own; the fastest is the ceiling.

    x lies in one piece; as many bytes are moved as it has, whatever its dtype.
    """
    library = load("ceilings.cpp")
    pointer = ctypes.c_void_p(x.data_ptr())
    n = ctypes.c_int64(x.numel() * x.element_size() // 4)
    near, far = ctypes.c_int64(0), ctypes.c_int64(PREFETCH_AHEAD)
    if kind == "read":
        read = library.ceiling_read
        read.restype = ctypes.c_float
        return {
            "read": functools.partial(read, pointer, n, near),
            "read, prefetching": functools.partial(read, pointer, n, far),
        }
    if kind != "copy":
        raise ValueError(f"expected kind to be read or copy, got {kind}")
    out = torch.empty_like(x)  # kept alive by the calls below

    def copy() -> None:
        library.ceiling_copy(pointer, ctypes.c_void_p(out.data_ptr()), n)

    def copy_streaming() -> None:
        library.ceiling_copy_streaming(pointer, ctypes.c_void_p(out.data_ptr()), n, far)

    return {"copy": copy, "copy, streaming": copy_streaming}


def naive_kl(
    variant: str, counts: Tensor, levels: int, precision: str = "float"
) -> Callable[[], int]:
    """The plain search for one histogram, int64 [B]; the call returns the number of bins kept."""
    function = getattr(load("naive_kl.cpp"), f"{variant}_{precision}")
    function.restype = ctypes.c_int64

    def run() -> int:
        pointer = ctypes.c_void_p(counts.data_ptr())
        found: int = function(pointer, ctypes.c_int64(counts.numel()), ctypes.c_int64(levels))
        return found

    return run
