"""The build: bad variables are refused by name, and what it made has the promised shape."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torch_ext
from paths import ROOT
from torch_ext import _C

BUILD = ROOT / "build" / "current"
VARIABLES = ("TORCH", "CUDA", "CUDA_ARCH", "PYTHON", "DATA", "JOBS", "MAX_JOBS", "CMAKE_ARGS")
VARIABLES += ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
CAPABILITIES = "compute capabilities from 80 on such as 80,90"


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | variables
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("target", ["example", "test", "lint"])
@pytest.mark.parametrize(
    ("variable", "value", "want"),
    [
        ("TORCH", "abc", "a release such as 2.13.0"),
        ("TORCH", "", "a release such as 2.13.0"),
        ("TORCH", "2.13.0; touch stray", "a release such as 2.13.0"),
        ("TORCH", "1.13.1", "2.11 or newer"),
        ("TORCH", "2.9", "2.11 or newer"),
        ("CUDA", "2", "0 or 1"),
        ("CUDA", "/usr/local/cuda", "0 or 1"),
        ("CUDA_ARCH", "75", CAPABILITIES),
        ("CUDA_ARCH", "90,", CAPABILITIES),
        ("CUDA_ARCH", "90;touch stray", CAPABILITIES),
        ("JOBS", "0", "a number from 1 to 9999"),
        ("JOBS", "-2", "a number from 1 to 9999"),
        ("JOBS", "two", "a number from 1 to 9999"),
        ("DATA", "/nonexistent", "a folder"),
        ("DATA", "README.md", "a folder"),
        ("PYTHON", "no-such-python", "a Python interpreter 3.10 or newer"),
        ("PYTHON", "/bin/false", "a Python interpreter 3.10 or newer"),
    ],
)
def test_make_refuses_a_bad_variable(target: str, variable: str, value: str, want: str) -> None:
    done = run("make", target, f"{variable}={value}")
    assert done.returncode != 0
    assert f'make: expected {variable} to be {want}, got "{value}"' in done.stderr
    assert not (ROOT / "stray").exists()


@pytest.mark.parametrize("value", ["0", "-1", "all", "1.5"])
def test_setup_refuses_a_bad_number_of_jobs(value: str, tmp_path: Path) -> None:
    done = run(sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path), MAX_JOBS=value)
    assert done.returncode != 0
    assert f"expected MAX_JOBS to be a positive number, got '{value}'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("variable", "value"), [("CUDA", "yes"), ("CUDA_ARCH", "sm_90")])
def test_setup_refuses_a_bad_choice_of_cuda(variable: str, value: str, tmp_path: Path) -> None:
    command = (sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path))
    done = run(*command, **{variable: value})
    assert done.returncode != 0
    assert f"setup.py: expected {variable} to be " in done.stderr
    assert f'got "{value}"' in done.stderr
    assert not list(tmp_path.iterdir())


def test_one_version() -> None:
    assert torch_ext.build_info()["version"] == importlib.metadata.version("torch_ext")


def test_instruction_sets_share_no_symbol() -> None:
    """A weak symbol is kept once for the whole library: perhaps the copy made of AVX-512 code."""
    archive = BUILD / "libtorch_ext_kernels.a"
    if not archive.is_file() or shutil.which("nm") is None:
        pytest.skip("needs the build tree of `make` and binutils")
    listing = subprocess.check_output(["nm", "-A", "-C", "--defined-only", archive], text=True)
    sets = set()
    for line in listing.splitlines():
        _, member, symbol = line.split(":", 2)
        found = re.match(r"isa_(\w+)\.", member)
        if found:
            sets.add(found[1])
            _, kind, name = symbol.split(maxsplit=2)
            assert kind not in "WVu" or f"::{found[1]}::" in name, line
    assert "base" in sets


def test_module_links_no_torch() -> None:
    libraries = subprocess.check_output(["ldd", _C.__file__], text=True)
    assert "libc" in libraries
    assert "torch" not in libraries
    assert "c10" not in libraries


def test_module_links_no_inner_loops() -> None:
    """It only answers names; the loops for every instruction set would be a second copy of them."""
    if shutil.which("nm") is None:
        pytest.skip("needs binutils")
    listing = subprocess.check_output(["nm", "-C", _C.__file__], text=True)
    assert "torch_ext::cpu::chosen()" in listing or not listing.strip()  # stripped
    assert not re.findall(r"torch_ext::cpu::(?:base|avx2|avx512)::.*", listing)


def test_ops_run_on_torchs_own_threads() -> None:
    """The first parallel op of a process starts Torch's pool, and there is one OpenMP only."""
    program = """
import os, re, numpy, torch
from torch_ext import ops
torch.set_num_threads(3)
x = torch.from_numpy(numpy.ones(1 << 20, dtype=numpy.float32))
statistic = [
    torch.from_numpy(numpy.array([[numpy.inf, -numpy.inf]], dtype=numpy.float32)),
    torch.from_numpy(numpy.zeros((1, 5), dtype=numpy.int64)),
    torch.from_numpy(numpy.zeros((1, 2, 0, 0), dtype=numpy.int64)),
]
before = len(os.listdir("/proc/self/task"))
ops.observe_(x, *statistic)
print(len(os.listdir("/proc/self/task")) - before)
maps = open("/proc/self/maps").read()
print(len(set(re.findall(r"\\S*lib[gi]*omp[^/]*\\.so\\S*", maps))))
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("counts threads through /proc")
    environment = os.environ | {"OMP_NUM_THREADS": "3"}
    out = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    started, runtimes = map(int, out.split())
    assert started >= 2
    assert runtimes == 1
