"""Builds the native libraries with CMake: source lists and flags are in CMakeLists.txt.

The environment variables MAX_JOBS (parallel compilations) and CMAKE_ARGS (more arguments for
the configuration, such as -DBUILD_TESTING=ON) are honoured.
"""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)


def version() -> str:
    """The version stands in CMakeLists.txt, where the native build needs it too."""
    found = re.search(r"project\(torch_ext VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert found, "CMakeLists.txt has no project version"
    return found[1]


def tool(name: str) -> str | None:
    """Path of a build tool: beside the interpreter, for a venv that is not active, or in PATH."""
    beside = os.path.dirname(sys.executable)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))


def jobs() -> int:
    text = os.environ.get("MAX_JOBS", "").strip() or str(os.cpu_count() or 1)
    if not text.isdecimal() or int(text) < 1:
        raise SystemExit(f"setup.py: expected MAX_JOBS to be a positive number, got {text!r}")
    return int(text)


def find_torch() -> tuple[Path, str]:
    """Folder and version of the Torch to build against: the one that will load the libraries.

    pip builds in an isolated environment without Torch unless told --no-build-isolation; the
    environment that pip installs into is then found through sysconfig.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    for folder in folders:
        if (folder / "version.py").is_file() and (folder / "include").is_dir():
            found = runpy.run_path(str(folder / "version.py"))["__version__"]
            release = re.match(r"(\d+)\.(\d+)", found)
            if not release or tuple(map(int, release.groups())) < OLDEST_TORCH:
                wanted = ".".join(map(str, OLDEST_TORCH))
                raise SystemExit(f"setup.py: expected torch to be {wanted} or newer, got {found}")
            return folder, found
    raise SystemExit(
        f"setup.py: expected torch to be installed for {sys.executable}, got none; "
        "install torch first, then build with --no-build-isolation"
    )


class CMakeBuild(build_ext):
    """One CMake build for all extensions."""

    def get_ext_filename(self, fullname: str) -> str:
        # The op library is no Python module: it keeps its plain name.
        *parents, name = fullname.split(".")
        if name == "libtorch_ext":
            return os.path.join(*parents, "libtorch_ext.so")
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        parallel = str(jobs())
        torch_root, torch_version = find_torch()
        cmake = tool("cmake") or "cmake"
        build = ROOT / "build" / f"torch-{torch_version}"
        package = Path(self.get_ext_fullpath("torch_ext._C")).resolve().parent
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-GNinja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja') or 'ninja'}"]
        configure += [f"-DPython3_EXECUTABLE={sys.executable}", f"-DTORCH_ROOT={torch_root}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.check_call(configure)
        subprocess.check_call([cmake, "--build", str(build), "--parallel", parallel])
        subprocess.check_call([cmake, "--install", str(build), "--prefix", str(package)])


setup(
    version=version(),
    # Both are declared, because an editable install copies only declared extensions.
    ext_modules=[Extension("torch_ext._C", []), Extension("torch_ext.libtorch_ext", [])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[name for name in ("cmake", "ninja") if tool(name) is None],
)
