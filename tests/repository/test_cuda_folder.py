"""What can be known of the GPU's tests without a GPU: they run, skip and fail as they should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import torch_ext
from paths import ROOT

HAS_DEVICE = torch.cuda.is_available() and torch_ext.build_info()["cuda"]


def pytest_of(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_EXT_")}
    return subprocess.run(
        command, cwd=ROOT, env={**kept, **variables}, capture_output=True, text=True, timeout=600
    )


def test_the_small_set_holds_with_the_cpu_in_the_gpus_place():
    done = pytest_of("-m", "sanitizer", "tests/cuda", TORCH_EXT_TEST_DEVICE="cpu")
    assert done.returncode == 0, done.stdout
    found = re.search(r"(\d+) passed, (\d+) deselected", done.stdout)
    assert found, done.stdout
    assert int(found[1]) > 50


@pytest.mark.skipif(HAS_DEVICE, reason="there is a device: the tests run")
def test_without_a_device_each_test_is_skipped_with_the_reason():
    done = pytest_of("-rs", "tests/cuda/test_cuda_merge.py")
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ skipped in", done.stdout), done.stdout
    reason = "no CUDA device|a build of torch_ext without CUDA kernels"
    assert re.search(rf"SKIPPED .*({reason})", done.stdout), done.stdout


@pytest.mark.skipif(HAS_DEVICE, reason="there is a device: the tests run")
def test_without_a_device_each_test_fails_where_one_is_required():
    done = pytest_of("tests/cuda/test_cuda_merge.py", TORCH_EXT_REQUIRE_CUDA="1")
    assert done.returncode == 1, done.stdout
    assert re.search(r"^\d+ errors in", done.stdout, re.MULTILINE), done.stdout
    assert "TORCH_EXT_REQUIRE_CUDA=1, but there is" in done.stdout


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on a CUDA device, and has no values."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cuda:0")

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(func.name())


@pytest.mark.skipif(torch_ext.build_info()["cuda"], reason="a build with CUDA kernels")
@pytest.mark.parametrize("op", ["fake_quant", "observe_", "qparams", "kl_threshold", "min_max"])
def test_a_build_without_cuda_kernels_refuses_a_cuda_tensor(op: str):
    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    arguments: dict[str, tuple[str, tuple[Any, ...]]] = {
        "fake_quant": ("x", (Elsewhere((4,), f32), Elsewhere((1,), f32), Elsewhere((1,), i32))),
        "observe_": (
            "x",
            (Elsewhere((4,), f32), Elsewhere((1, 2), f32), *[Elsewhere((1, 5), i64)] * 2),
        ),
        "qparams": ("range", (Elsewhere((1, 2), f32), "[-128,127] symmetric")),
        "kl_threshold": ("counts", (Elsewhere((1, 300), i64), Elsewhere((1,), torch.float64))),
        "min_max": ("x", (Elsewhere((4,), f32),)),
    }
    named, given = arguments[op]
    if op == "fake_quant":
        given = (*given, "[-128,127]")
    text = f"{op}: expected {named} to be on the CPU (a build without CUDA kernels), got cuda:0"
    with torch._C._DisableTorchDispatch(), pytest.raises(RuntimeError, match=re.escape(text)):
        getattr(torch.ops.torch_ext, op)(*given)
