"""An observer is one header, one line and one test: csrc/README.md's is built and found everywhere.

Everything else in the copy is as it is here. The C++ law tests of the copy run over it too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "new_observer"
GUIDE = ROOT / "csrc" / "README.md"
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
HELPERS = ("parallel.cpp", "parallel_threads.h", "statistic_plain.h", "view_plain.h", "solving.h")
LAWS = "rules_test.cpp"

GOLDEN = """
#include "observers/half_max.h"
#include <gtest/gtest.h>
#include "solving.h"

TEST(HalfMax, HalvesTheRange) {
  solving::Memory memory = solving::observed({-3, 1, 5});
  const auto have = solving::solve<torch_ext::observers::HalfMax>(memory, solving::kInt8);
  EXPECT_EQ(have.range, (std::vector<float>{-1.5f, 2.5f}));
  torch_ext::cpu::test_threads() = 1;
}
"""

# Torch's headers are most of the compile time: parsed once, without optimization.
FASTER = """
cmake_language(DEFER CALL target_precompile_headers torch_ext PRIVATE
  <torch/csrc/autograd/custom_function.h> <torch/library.h>)
"""
QUICK = ("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0")

PROGRAM = """
import sys
import torch, torch_ext
from torch import tensor
from torch_ext import FakeQuantize, FakeQuantState, Observer, _C

folder = sys.argv[1]
assert torch_ext.__file__.startswith(folder) and _C.__file__.startswith(folder)
assert "half_max" in _C.observers() and "half_max" in torch_ext.observers()
assert _C.observer_info("half_max") == {
    "kind": "closed", "statistic": "extrema", "max_bits": 16, "options": []
}

x = tensor([[-2.0, 1.0, 0.5], [3.0, 8.0, -4.0]])
whole, rows = tensor([[-2.0, 4.0]]), tensor([[-1.0, 0.5], [-2.0, 4.0]])
op = torch.ops.torch_ext.half_max
assert torch.equal(op(x), whole)
assert torch.equal(op(x, ch_axis=0), rows)
assert torch.equal(torch_ext.ops.half_max(x, ch_axis=0), rows)
assert op(x.to("meta"), ch_axis=1).shape == (3, 2)

per_channel = Observer(
    "half_max", qscheme=torch.per_channel_symmetric, ch_axis=0, channel_len=2
)
for observer, want in [(Observer("half_max"), whole), (per_channel, rows)]:
    observer(x[:, :2])
    observer(x[:, 2:])
    assert torch.equal(observer.range(), want)

model = torch.nn.Sequential(torch.nn.Linear(3, 2))
model.qconfig = torch_ext.get_default_qconfig(
    activation_observer="half_max", weight_observer="half_max"
)
model = torch_ext.prepare_qat(model)
torch_ext.set_fake_quantize(model, FakeQuantState.CALIBRATION)
model(x)
torch_ext.set_fake_quantize(model, FakeQuantState.VALIDATION)
ranges = [m.range for m in model.modules() if isinstance(m, FakeQuantize)]
assert any(torch.equal(r, whole) for r in ranges), ranges
"""


def header() -> str:
    blocks = re.findall(r"^```cpp\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    (found,) = [text for text in blocks if "struct HalfMax" in text]
    return str(found)


def registry() -> str:
    """With the include and the line."""
    text = (ROOT / "csrc/registry.h").read_text()
    first = '#include "observers/'
    text = text.replace(first, f'{first}half_max.h"\n{first}', 1)
    line = r"\1, observers::HalfMax>;"
    text, listed = re.subn(r"(using Observers = List<[^;]*)>;", line, text, count=1)
    assert listed == 1
    return text


def place(path: Path, text: str, source: Path) -> None:
    """A file no newer than what it is made of: the next build compiles only what changed."""
    path.write_text(text)
    made = max(source.stat().st_mtime_ns, Path(__file__).stat().st_mtime_ns)
    os.utime(path, ns=(made, made))


def copy_tree() -> None:
    for name in ("csrc", "torch_ext", "tests"):
        shutil.rmtree(COPY / name, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "torch_ext"):
        shutil.copytree(ROOT / name, COPY / name, ignore=ignore)
    (COPY / "tests/core").mkdir(parents=True)
    for name in (*HELPERS, LAWS):
        shutil.copy2(ROOT / "tests/core" / name, COPY / "tests/core" / name)
    shutil.copy2(ROOT / "CMakeLists.txt", COPY / "CMakeLists.txt")
    place(COPY / "csrc/observers/half_max.h", header(), GUIDE)
    place(COPY / "csrc/registry.h", registry(), ROOT / "csrc/registry.h")
    place(COPY / "tests/core/half_max_test.cpp", GOLDEN, Path(__file__))
    place(COPY / "faster.cmake", FASTER, Path(__file__))


@pytest.fixture(scope="module")
def built() -> Path:
    """The build folder of a copy that has the observer; its package has the libraries."""
    cmake, ninja = (shutil.which(name, path=SEARCH) for name in ("cmake", "ninja"))
    if cmake is None or ninja is None:
        pytest.skip("needs cmake and ninja")
    copy_tree()
    build = COPY / "build"
    jobs = os.environ.get("JOBS") or str(min(os.cpu_count() or 1, 2))
    configure = [cmake, "-S", str(COPY), "-B", str(build), "-GNinja", "-DBUILD_TESTING=ON"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython3_EXECUTABLE={sys.executable}"]
    configure += [f"-DTORCH_ROOT={Path(torch.__file__).parent}", *QUICK]
    configure += [f"-DCMAKE_PROJECT_torch_ext_INCLUDE={COPY / 'faster.cmake'}"]
    targets = ["torch_ext", "_C", "core_half_max_test", "core_rules_test"]
    for command in (
        configure,
        [cmake, "--build", str(build), "--parallel", jobs, "--target", *targets],
        [cmake, "--install", str(build), "--prefix", str(COPY / "torch_ext")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return build


def test_ops_and_modules_have_it(built: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(COPY)],
        cwd=COPY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_its_own_test_passes(built: Path) -> None:
    done = subprocess.run([built / "core_half_max_test"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_laws_hold_for_it(built: Path) -> None:
    done = subprocess.run(
        [built / "core_rules_test", "--gtest_filter=Rules/half_max.*"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"\[  PASSED  \] (\d+) tests", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 5, done.stdout
