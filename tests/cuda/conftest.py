"""The device that is compared with the CPU.

Where there is no GPU, or the build has no CUDA kernels, every test here is skipped with the reason;
with ``TORCH_EXT_REQUIRE_CUDA=1`` it fails for it. ``TORCH_EXT_TEST_DEVICE=cpu`` is a dry run: the
CPU stands in for the GPU, so that the tests themselves can be run, and broken, anywhere.
"""

from __future__ import annotations

import os

# Torch's matrix products are reproducible only with a workspace of a fixed size. Read when CUDA
# starts, which importing Torch does not do.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import torch_ext


def missing(device: torch.device) -> str | None:
    """Why the tests cannot run on this device."""
    if device.type == "cpu":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch_ext.build_info()["cuda"]:
        return "a build of torch_ext without CUDA kernels"
    return None


@pytest.fixture(scope="session")
def device() -> torch.device:
    chosen = torch.device(os.environ.get("TORCH_EXT_TEST_DEVICE", "cuda"))
    why = missing(chosen)
    if why is not None and os.environ.get("TORCH_EXT_REQUIRE_CUDA") == "1":
        pytest.fail(f"TORCH_EXT_REQUIRE_CUDA=1, but there is {why}", pytrace=False)
    if why is not None:
        pytest.skip(why)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


@pytest.fixture(autouse=True)
def _needs_the_device(device: torch.device) -> None:
    """Also for tests that do not ask for it."""
