"""Whether the CUDA kernels are built: by the torch, the nvcc and the wish at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

import toolchain

CPU_WHEEL = toolchain.Torch(Path("/torch"), "2.13.0+cpu", None)
CUDA_WHEEL = toolchain.Torch(Path("/torch"), "2.14.1+cu130", "13.0")


def make_nvcc(folder: Path, release: str) -> Path:
    """A program that answers --version as nvcc does."""
    folder.mkdir(parents=True)
    program = folder / "nvcc"
    program.write_text(
        f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n"
    )
    program.chmod(0o755)
    return program


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA", "CUDA_ARCH", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(toolchain, "USUAL_FOLDER", str(tmp_path / "usual"))


@pytest.mark.parametrize("place", ["PATH", "CUDA_HOME", "CUDACXX", "usual"])
def test_nvcc_is_found(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "toolkit"
    nvcc = make_nvcc(tmp_path / "usual" if place == "usual" else home / "bin", "13.0")
    value = {"PATH": home / "bin", "CUDA_HOME": home, "CUDACXX": nvcc, "usual": "elsewhere"}[place]
    monkeypatch.setenv(place, str(value))
    assert toolchain.choose_nvcc(CUDA_WHEEL) == str(nvcc)
    assert toolchain.choose_nvcc(CPU_WHEEL) is None
    monkeypatch.setenv("CUDA", "0")
    assert toolchain.choose_nvcc(CUDA_WHEEL) is None


def test_a_build_with_cuda_has_its_own_folder() -> None:
    assert toolchain.folder_name(CUDA_WHEEL, None) == "torch-2.14.1+cu130"
    assert toolchain.folder_name(CUDA_WHEEL, "/nvcc") == "torch-2.14.1+cu130-cuda"


def test_cuda_can_be_demanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA", "1")
    with pytest.raises(toolchain.BadChoice, match=r"expected torch to be a CUDA build, got 2\.13"):
        toolchain.choose_nvcc(CPU_WHEEL)
    with pytest.raises(toolchain.BadChoice, match=r"expected nvcc to be in PATH.*, got none"):
        toolchain.choose_nvcc(CUDA_WHEEL)
    make_nvcc(tmp_path / "usual", "12.6")
    with pytest.raises(toolchain.BadChoice, match=r"expected nvcc to be of CUDA 13.*, got 12\.6"):
        toolchain.choose_nvcc(CUDA_WHEEL)
    monkeypatch.delenv("CUDA")
    assert toolchain.choose_nvcc(CUDA_WHEEL) is None


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert toolchain.architectures() == []
    monkeypatch.setenv("CUDA_ARCH", "80-real,90a;120")
    assert toolchain.architectures() == ["80-real", "90a", "120"]


@pytest.mark.parametrize(("jobs", "threads"), [(1, 1), (2, 2), (7, 2), (8, 2), (16, 4), (64, 16)])
def test_architectures_are_compiled_at_the_same_time(
    jobs: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NVCC_APPEND_FLAGS", raising=False)
    assert toolchain.nvcc_flags(jobs) == f"--threads {threads}"
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert toolchain.nvcc_flags(jobs) == f"-lineinfo --threads {threads}"
