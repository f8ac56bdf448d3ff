"""What `make` installs: versions that are pinned, and for each target what it needs."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import packages
import toolchain
from paths import ROOT

LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
CPYTHON = {"platform_python_implementation": "CPython", "implementation_name": "cpython"}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def holds(requirement: Requirement, release: str) -> bool:
    """Whether a requirement is one for a release of Python."""
    python = {"python_version": release, "python_full_version": f"{release}.9", **LINUX, **CPYTHON}
    return requirement.marker is None or requirement.marker.evaluate(python)


def pins(release: str) -> dict[str, str]:
    """The version of each package that tools/constraints.txt holds, for one release of Python."""
    versions: dict[str, str] = {}
    for line in packages.CONSTRAINTS.read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if holds(requirement, release):
                name = canonicalize_name(requirement.name)
                assert name not in versions, line
                (clause,) = requirement.specifier
                assert clause.operator == "==", line
                versions[name] = clause.version
    return versions


def torchvision_of() -> dict[str, str]:
    """The release of torchvision that goes with each release of torch."""
    text = packages.CONSTRAINTS.read_text()
    return dict(re.findall(r"^#torch (\S+): torchvision==(\S+)$", text, re.MULTILINE))


def every_requirement() -> list[Requirement]:
    extras = packages.project()["project"]["optional-dependencies"]
    lines = [*packages.requirements(list(extras)), *packages.BUILD_TOOLS]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("release", PYTHONS)
def test_every_package_is_pinned_inside_its_range(release: str) -> None:
    versions = pins(release)
    for requirement in every_requirement():
        if requirement.name == "torch" or not holds(requirement, release):
            continue
        if requirement.name == "torchvision":
            allowed = set(torchvision_of().values())
        else:
            allowed = {versions[canonicalize_name(requirement.name)]}
        assert all(requirement.specifier.contains(version) for version in allowed), requirement


def test_torchvision_is_pinned_for_each_supported_torch() -> None:
    default = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert default is not None
    assert default[1] in packages.TORCHES
    assert tuple(torchvision_of()) == packages.TORCHES
    oldest = ".".join(map(str, toolchain.OLDEST_TORCH))
    assert packages.TORCHES[0] == f"{oldest}.0"


def test_what_is_installed_is_pinned() -> None:
    """Also what the packages of pyproject.toml ask for in their turn."""
    versions = pins(f"{sys.version_info[0]}.{sys.version_info[1]}")
    ours = Path(sys.prefix) == ROOT / ".venv"  # made by `make`, in these versions
    waiting = every_requirement()
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another target, or of another release of torch
        for extra in ("", *requirement.extras):
            for text in installed.requires or []:
                child = Requirement(text)
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    waiting += [child] if str(child) not in seen else []
                    seen.add(str(child))
        if not packages.of_torch(f"{name}=="):
            assert name in versions, f"{requirement} stands not in {packages.CONSTRAINTS}"
            assert not ours or installed.version == versions[name], name
    assert len(seen) > 50


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """With a .venv that has torch already, and a pip that only writes down what it is to do."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, line in (
        ("python", f'exec "{sys.executable}" "$@"'),
        ("pip", f'echo "$*" >>"{tmp_path}/calls"'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    return tmp_path


def set_up(checkout: Path, mode: str) -> subprocess.CompletedProcess[str]:
    torch = importlib.metadata.version("torch")
    environment = {"PATH": os.environ["PATH"], "TORCH": torch}
    command = [checkout / "tools" / "setup.sh", mode]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_setup_installs_what_a_target_needs_once(checkout: Path) -> None:
    for _ in range(2):
        done = set_up(checkout, "lint")
        assert done.returncode == 0, done.stderr
    (call,) = (checkout / "calls").read_text().splitlines()
    options, _, requirements = call.partition(" setuptools")
    assert options == "install -q -c .venv/constraints.txt"
    names = {re.split(r"[<>=]", word)[0] for word in f"setuptools{requirements}".split()}
    assert {"torch", "numpy", "setuptools", "rich", "ruff", "mypy"} <= names
    assert not {"pytest", "onnx", "sphinx", "scikit-learn"} & names


def test_setup_installs_again_where_the_constraints_were_raised(checkout: Path) -> None:
    set_up(checkout, "lint")
    with (checkout / "tools" / "constraints.txt").open("a") as file:
        file.write("raised==1\n")
    done = set_up(checkout, "lint")
    assert done.returncode == 0, done.stderr
    first, second = (checkout / "calls").read_text().splitlines()
    assert first == second
    assert "raised==1" in (checkout / ".venv" / "constraints.txt").read_text()


def test_setup_holds_torch_and_its_torchvision(checkout: Path) -> None:
    assert set_up(checkout, "lint").returncode == 0
    held = (checkout / ".venv" / "constraints.txt").read_text().splitlines()
    torch = importlib.metadata.version("torch")
    assert f"torch=={torch}" in held
    pinned = torchvision_of().get(torch.partition("+")[0])
    assert [line for line in held if line.startswith("torchvision==")] == (
        [f"torchvision=={pinned}"] if pinned else []
    )


def test_one_function_of_setup_installs() -> None:
    script = (ROOT / "tools" / "setup.sh").read_text()
    assert len(re.findall("pip install", script)) == 1


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("a==1 ; python_full_version < '3.11'", "a==1 ; python_full_version < '3.11'"),
        ("anyio==4.16.0 ; sys_platform != 'emscripten'", "anyio==4.16.0"),
        ("h11==1 ; python_full_version >= '3.11' or sys_platform != 'emscripten'", "h11==1"),
        ("colorama==0.4.6 ; sys_platform == 'win32'", None),
        ("a==1 ; python_full_version < '3.11' and sys_platform == 'darwin'", None),
        (
            "a==1 ; python_full_version >= '3.11' and sys_platform == 'linux'",
            "a==1 ; python_full_version >= '3.11'",
        ),
        (
            "a==1 ; (python_version < '3.11' or python_version > '3.12') and os_name == 'posix'",
            "a==1 ; (python_version < '3.11' or python_version > '3.12')",
        ),
        ("b==1 ; platform_python_implementation != 'PyPy'", "b==1"),
        ("hf-xet==1 ; platform_machine == 'arm64' or platform_machine == 'x86_64'", "hf-xet==1"),
    ],
)
def test_markers_are_those_of_linux(line: str, want: str | None) -> None:
    assert packages.on_linux(line) == want


def test_packages_of_an_unknown_extra() -> None:
    with pytest.raises(SystemExit, match=r'one of workflow, pt2e, export, test, .*got "tests"'):
        packages.requirements(["workflow", "tests"])


def test_setup_refuses_an_unknown_mode(checkout: Path) -> None:
    done = set_up(checkout, "examples")
    assert done.returncode == 2
    wanted = (
        "to be build, example, bench, docs, lint, test, trained, engines, accuracy, formats or "
        'zoo, got "examples"'
    )
    assert wanted in done.stderr
