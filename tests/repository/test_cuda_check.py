"""make cuda-check: what it reads out of ptxas's log, and what it calls a failure."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import cuda_check
import toolchain

CLEAN = "_ZN9torch_ext3gpu3runINS_4cuda34_GLOBAL__N__54bd_6_map_cu_edcf09cf3SumEEEvT_"
SPILLS = CLEAN.replace("3Sum", "3Mul")
LOG = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{CLEAN}' for 'sm_90'
ptxas info    : Function properties for {CLEAN}
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 400 bytes smem, 384 bytes cmem[0]
ptxas info    : Compiling entry function '{SPILLS}' for 'sm_80'
ptxas info    : Function properties for {SPILLS}
    96 bytes stack frame, 72 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
ptxas info    : Function properties for helper
    0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
"""

# Stands in for nvcc: leaves the files that nvcc would and counts its calls.
NVCC = """#!/bin/sh
case "$*" in *--version*) echo "release 13.0, V13.0.88"; exit;; esac
echo call >> '{folder}/calls'
for word in "$@"; do case "$before" in
    -MF) echo "object : csrc/cuda/map.cu csrc/core/a.h \\\\\n /usr/include/b.h" > "$word";;
esac; before=$word; done
cat '{folder}/log'
exit {status}
"""


def test_every_number_of_the_log() -> None:
    row = cuda_check.Row
    assert cuda_check.parse(LOG) == [
        row(CLEAN, "sm_90", registers=32, spills=0, shared=400, stack=8),
        row(SPILLS, "sm_80", registers=255, spills=132, shared=0, stack=96),
        row("helper", "sm_80", registers=None, spills=4, shared=0, stack=0),
    ]


def test_table_shows_readable_names() -> None:
    if shutil.which("c++filt") is None:
        pytest.skip("needs binutils")
    head, clean, spills, helper = cuda_check.table(cuda_check.parse(LOG)).splitlines()
    assert head.split() == ["kernel", "for", "registers", "spills", "shared", "stack"]
    assert clean.split() == ["Sum", "sm_90", "32", "0", "400", "8"]
    assert spills.split() == ["Mul", "sm_80", "255", "132", "0", "96"]
    assert helper.split() == ["helper", "sm_80", "4", "0", "0"]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with one CUDA source, which a stand-in for nvcc compiles."""
    for folder in ("csrc/cuda", "csrc/core"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("csrc/cuda/map.cu", "csrc/core/a.h"):
        (tmp_path / file).write_text("// one")
    (tmp_path / "CMakeLists.txt").write_text(
        "set(TORCH_EXT_CUDA_SOURCES\n  csrc/cuda/map.cu)\nset(TORCH_EXT_CUDA_FLAGS --fmad=false)\n"
    )
    (tmp_path / "log").write_text(LOG.split("ptxas info    : Compiling")[0])
    monkeypatch.setattr(cuda_check, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_check, "CACHE", tmp_path / "build")
    monkeypatch.delenv("CUDA_ARCH", raising=False)
    return tmp_path


def check(tree: Path, log: str, status: int = 0) -> str:
    (tree / "log").write_text(log)
    nvcc = tree / "nvcc"
    nvcc.write_text(NVCC.format(folder=tree, status=status))
    nvcc.chmod(0o755)
    return cuda_check.check(str(nvcc))


def only(kernel: str) -> str:
    """The part of the log about one kernel."""
    parts = LOG.split("ptxas info    : Compiling")
    return "ptxas info    : Compiling" + next(part for part in parts if kernel in part)


def test_spills_are_a_failure(tree: Path) -> None:
    assert check(tree, only(CLEAN)) == "cuda-check: 1 kernels in 1 files, no spills"
    (tree / "csrc/cuda/map.cu").write_text("// two")
    with pytest.raises(SystemExit, match=r"map\.cu: \w+ spills 132 bytes for sm_80\n.*4 bytes"):
        check(tree, LOG)


def test_what_does_not_compile_is_a_failure(tree: Path) -> None:
    with pytest.raises(SystemExit, match=r"map\.cu does not compile:\n(?s:.*)too bad"):
        check(tree, only(CLEAN) + "too bad", status=1)
    # Nothing of it was kept.
    assert check(tree, only(CLEAN)).endswith("no spills")


def test_nothing_to_check_is_a_failure(tree: Path) -> None:
    with pytest.raises(SystemExit, match="no kernel was found"):
        check(tree, "")
    (tree / "csrc/cuda/map.cu").rename(tree / "csrc/cuda/pam.cu")
    with pytest.raises(SystemExit, match=r"map\.cu is in the list.*\n.*pam\.cu is in the list"):
        check(tree, only(CLEAN))


@pytest.mark.parametrize("touched", ["csrc/cuda/map.cu", "csrc/core/a.h", "CMakeLists.txt"])
def test_only_what_changed_is_compiled_again(tree: Path, touched: str) -> None:
    for _ in range(2):
        check(tree, only(CLEAN))
    assert (tree / "calls").read_text().count("call") == 1
    text = (tree / touched).read_text()
    (tree / touched).write_text(text.replace("=false", "=true").replace("one", "two"))
    for _ in range(2):
        check(tree, only(CLEAN))
    assert (tree / "calls").read_text().count("call") == 2


def test_each_architecture_is_compiled_by_itself(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that they are compiled at the same time, and one more does not repeat the others."""
    for value, calls in ("80,90", 2), ("80,90,120", 3):
        monkeypatch.setenv("CUDA_ARCH", value)
        assert check(tree, only(CLEAN)) == f"cuda-check: {calls} kernels in 1 files, no spills"
        assert (tree / "calls").read_text().count("call") == calls


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    for arguments, code in ([], 2), (["--if-nvcc"], 0):
        monkeypatch.setattr(sys, "argv", ["cuda_check.py", *arguments])
        with pytest.raises(SystemExit) as end:
            cuda_check.main()
        assert end.value.code == code
        assert "no nvcc in PATH" in capsys.readouterr().out
