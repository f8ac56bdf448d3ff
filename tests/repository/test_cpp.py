"""C++ users: what the wheel carries, find_package(torch_ext) from it and from the build tree, and
examples/cpp, built, run and compared with Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import torch_ext
from paths import ROOT

BUILD = ROOT / "build" / "current"
TORCH = Path(torch.__file__).parent
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
TOOLS = {name: shutil.which(name, path=SEARCH) for name in ("cmake", "ninja", "ccache")}
# A name that has to be quoted in a linker's arguments.
WORK = ROOT / "build" / "cpp users"
CONFIG = Path("share/cmake/torch_ext/torch_extConfig.cmake")

pytestmark = pytest.mark.skipif(
    None in (TOOLS["cmake"], TOOLS["ninja"]) or not (BUILD / "build.ninja").is_file(),
    reason="needs the build tree of `make`, cmake and ninja",
)


def run(*command: object, fails: bool = False) -> str:
    """What it prints, warnings and errors included."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def configure(source: Path, build: Path, *, fails: bool = False, **values: object) -> str:
    shutil.rmtree(build, ignore_errors=True)
    values["CMAKE_MAKE_PROGRAM"] = TOOLS["ninja"]
    if TOOLS["ccache"]:
        values["CMAKE_CXX_COMPILER_LAUNCHER"] = TOOLS["ccache"]
    options = [f"-D{name}={value}" for name, value in values.items()]
    text = run(TOOLS["cmake"], "-S", source, "-B", build, "-GNinja", *options, fails=fails)
    return " ".join(text.split())  # CMake breaks the lines of messages


@pytest.fixture(scope="module")
def wheel() -> Path:
    """Built by pip in the checkout, where nothing is left to compile."""
    shutil.rmtree(WORK, ignore_errors=True)
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "wheel", "-q", *options, "-w", WORK, ".")
    (found,) = WORK.glob("torch_ext-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder of the package that pip installs from the wheel."""
    site = WORK / "site packages"
    options = ["--no-deps", "--disable-pip-version-check", "--target", site]
    run(sys.executable, "-m", "pip", "install", "-q", *options, wheel)
    return site / "torch_ext"


@pytest.fixture(scope="module")
def made(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both programs and the package for the one of them, made side by side: the longest step."""
    folders = [TORCH / "share/cmake", installed / "share/cmake"]
    # Beside a CUDA build, TorchConfig.cmake wants a toolkit that need not be there.
    which = {"TORCH_ROOT": TORCH} if torch.version.cuda else {}
    configure(
        ROOT / "examples/cpp",
        WORK / "example",
        CMAKE_PREFIX_PATH=";".join(map(str, folders)),
        CMAKE_CXX_FLAGS_RELEASE="-O1",  # quicker to compile
        **which,
    )
    configure(
        ROOT / "tests/cpp/quantizer",
        WORK / "quantizer",
        CMAKE_PREFIX_PATH=BUILD,
        TORCH_ROOT=TORCH,
    )
    # Of its own, because Inductor's cache does not see a change of the ops.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor"))}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | cache
    started = [
        subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment)
        for command in (
            (TOOLS["cmake"], "--build", WORK / "example"),
            (TOOLS["cmake"], "--build", WORK / "quantizer"),
            (sys.executable, "examples/cpp/make_package.py", WORK / "package"),
        )
    ]
    assert [process.wait(timeout=600) for process in started] == [0, 0, 0]
    return WORK


# ---- the package -------------------------------------------------------------------------------


def test_wheel_carries_headers_library_and_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    headers = {"torch_ext/include/torch_ext/registry.h"}
    for folder in ("core", "observers", "fake_quant"):
        found = (ROOT / "csrc" / folder).glob("*.h")
        headers |= {f"torch_ext/include/torch_ext/{folder}/{file.name}" for file in found}
    assert {name for name in names if name.endswith(".h")} == headers
    assert {f"torch_ext/{CONFIG}", "torch_ext/libtorch_ext.so"} <= names
    assert f"torch_ext/{CONFIG.with_name('torch_extConfigVersion.cmake')}" in names


def test_headers_name_each_other_by_the_package(installed: Path) -> None:
    """`core/grid.h` alone could be another library's."""
    for path in (installed / "include").rglob("*.h"):
        for name in re.findall(r"#include (\S+)", path.read_text()):
            assert re.fullmatch(r"<(torch_ext/[\w/]+\.h|\w+)>", name), (path, name)


def test_python_says_where_the_package_is(installed: Path) -> None:
    program = "import torch_ext; print(torch_ext.cmake_prefix_path)"
    environment = os.environ | {"PYTHONPATH": str(installed.parent)}
    out = subprocess.check_output(
        [sys.executable, "-c", program], cwd=WORK, env=environment, text=True
    )
    assert Path(out.strip()) == installed / "share/cmake"
    assert (Path(torch_ext.cmake_prefix_path) / "torch_ext").parts[-4:-1] == (
        "torch_ext",
        "share",
        "cmake",
    )


@pytest.mark.parametrize("where", ["installed", "build tree"])
def test_core_needs_no_torch(where: str, installed: Path) -> None:
    prefix = BUILD if where == "build tree" else installed / "share/cmake"
    build = WORK / f"core from {where}"
    configure(ROOT / "tests/cpp/core", build, CMAKE_PREFIX_PATH=prefix)
    run(TOOLS["cmake"], "--build", build)
    assert "torch" not in run("ldd", build / "program")
    said = dict(line.split(" ", 1) for line in run(build / "program").splitlines())
    # [-1, 3] on [-128, 127]: 255 steps over 4; -128 - (-1) * 255 / 4 = -64.25.
    assert np.float32(said["scale"]) == np.float32(4 / 255)
    assert said["zero_point"] == "-64"
    assert tuple(said["rules"].split()) == torch_ext.observers()
    assert set(said["states"].split()) == {state.value for state in torch_ext.FakeQuantState}


VERSION = """\
#define TORCH_VERSION_MAJOR 2
#define TORCH_VERSION_MINOR 10
#define TORCH_VERSION_PATCH 3
#define TORCH_VERSION "2.10.3"
"""


@pytest.fixture
def old_torch(tmp_path: Path) -> Path:
    """What find_package reads of another release."""
    headers = tmp_path / "torch" / "include/torch/headeronly"
    headers.mkdir(parents=True)
    (headers / "version.h").write_text(VERSION)
    return tmp_path / "torch"


def refused(tmp_path: Path, wanted: str = "REQUIRED", **values: object) -> str:
    """The message that ends the configuration."""
    source, prefix = ROOT / "tests/cpp/refused", BUILD / "share/cmake"
    return configure(
        source,
        tmp_path / "build",
        fails=True,
        WANTED=wanted,
        CMAKE_PREFIX_PATH=prefix,
        **values,
    )


def test_another_torch_is_refused(tmp_path: Path, old_torch: Path) -> None:
    built = torch_ext.build_info()["torch"]
    release = ".".join(built.split(".")[:2])
    want = f"to be release {release}, as torch_ext was built against {built}, got 2.10.3;"
    text = refused(tmp_path, TORCH_ROOT=old_torch)
    assert f"torch_ext: expected Torch in {old_torch} {want}" in text
    text = refused(tmp_path, STUB=old_torch)
    assert f"torch_ext: expected Torch of find_package(Torch) {want}" in text


def test_missing_torch_is_refused(tmp_path: Path) -> None:
    text = refused(tmp_path)
    assert "torch_ext: expected Torch to be found first, got none; call find_package(Torch)" in text
    text = refused(tmp_path, TORCH_ROOT=tmp_path / "nowhere")
    assert f"torch_ext: expected Torch in {tmp_path}/nowhere to have headers that name" in text


def test_unknown_component_and_other_version_are_refused(tmp_path: Path) -> None:
    text = refused(tmp_path, "REQUIRED;COMPONENTS;core;ops")
    assert 'torch_ext: unknown component "ops"; known: core, torch_ext' in text
    assert "compatible with requested version" in refused(tmp_path, "9.0;REQUIRED")


def test_optional_component_may_be_missing(tmp_path: Path) -> None:
    text = configure(
        ROOT / "tests/cpp/refused",
        tmp_path / "build",
        WANTED="REQUIRED;COMPONENTS;core;OPTIONAL_COMPONENTS;torch_ext",
        CMAKE_PREFIX_PATH=BUILD / "share/cmake",
    )
    assert "defined core" in text
    assert "defined torch_ext" not in text


# ---- the example -------------------------------------------------------------------------------


def test_quantizer_does_what_the_states_say(made: Path) -> None:
    """By hand: [-1, 3] on 255 steps is 2 * 3 / 255; -1 / scale = -42.5 rounds to even."""
    said = dict(line.split(": ", 1) for line in run(made / "quantizer/program").splitlines())
    numbers = {key: np.float32(text.split()) for key, text in said.items() if key in NUMBERS}
    for key, want in NUMBERS.items():
        np.testing.assert_allclose(numbers[key], np.float32(want), rtol=2e-7, err_msg=key)
    assert said["float keeps"] == said["validation keeps"] == "1"
    assert said["kept"] == "calibration 0"
    assert said["after load"] == "float"
    for case, want in REFUSALS.items():
        assert want in said[case], case


NUMBERS = {
    "float": [-1, 0.3, 3, 0],
    "calibration": [-1, 0.3, 3, 0],
    "range": [-1, 3],
    "scale": [6 / 255],
    "tally": [4, 1, 0, 0, 0],
    "validation": [-42, 13, 127, 0],
    "qat range": [-1, 3.04],
    "qat gradient": [1, 0],
    "channel scales": [2, 0.4],
}
NO_RANGE = "to have a range for VALIDATION, got none for "
NO_DATA = "to have seen data, got none for "
REFUSALS = {
    "no range": f"{NO_RANGE}0 1;",
    "no data": f"{NO_DATA}1;",
    "lone": f"{NO_RANGE}example::QuantizerImpl;",
    "non-finite only": f"{NO_DATA}example::QuantizerImpl;",
    "rule": 'unknown rule "histogram"; known: min_max, ',
    "input": "observe_: expected extrema to be of shape [4, 2], got [3, 2]",
    "loaded": NO_RANGE,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.load:DeprecationWarning")
def test_example_runs(made: Path) -> None:
    text = run(made / "example/calibrate", made / "package")
    assert "package: quantized images are Python's bit for bit, logits within" in text
    assert re.search(r"Quantizer: scale 0\.0\d+ is Python's bit for bit", text)
    assert re.search(r"saved and read back +\d+\.\d\d %   the same bits", text)
    found = {m[1].strip(): float(m[2]) for m in re.finditer(r"^(.+?) +(\d+\.\d\d) %", text, re.M)}
    assert found["float"] > 90
    assert found["INT8, calibrated"] > found["float"] - 3
    assert found["INT4 weights, 40 steps of QAT"] > found["INT4 weights, calibrated"]

    saved = torch.jit.load(made / "package/calibrated.pt").state_dict()
    for layer in ("conv1", "conv2", "fc"):
        weight, name = saved[f"{layer}.weight"], f"{layer}.weight_quantizer.scale"
        want = 2 * weight.flatten(1).abs().amax(1).double() / 255
        assert torch.equal(saved[name], want.float()), layer


def test_example_refuses_bad_files(made: Path, tmp_path: Path) -> None:
    program = made / "example/calibrate"
    assert "usage: calibrate FOLDER" in run(program, fails=True)
    text = run(program, tmp_path, fails=True)
    assert f"calibrate: expected {tmp_path}/expected.pt to be a file" in text
    for name in ("expected.pt", "model.pt2"):
        shutil.copytree(made / "package", tmp_path, dirs_exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1000])
        assert run(program, tmp_path, fails=True).startswith("calibrate: "), name


def test_package_runs_in_python(made: Path) -> None:
    """The AOTInductor package for another batch size than the one it was made with."""
    expected: dict[str, Tensor] = torch.load(made / "package/expected.pt", weights_only=True)
    package = torch._inductor.aoti_load_package(str(made / "package/model.pt2"))
    for images in (expected["images"], expected["images"][:3].clone()):
        quantized, logits = package(images)
        count = len(images)
        assert torch.equal(quantized, expected["quantized"][:count])
        torch.testing.assert_close(logits, expected["logits"][:count], rtol=0, atol=1e-5)
    scale = expected["scale"].numpy()
    steps = np.clip(np.rint(expected["images"].numpy() / scale), -128, 127)
    assert np.array_equal(expected["quantized"].numpy(), steps * scale)
