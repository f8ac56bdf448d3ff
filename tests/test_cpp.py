"""C++ users: what the wheel carries; find_package(torch_ext) from it and from the build tree."""

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

import torch_ext

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "current"
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
