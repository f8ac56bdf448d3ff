"""Builds the native libraries with CMake: source lists and flags are in CMakeLists.txt.

These environment variables are honoured: MAX_JOBS (parallel compilations), CMAKE_ARGS (more
arguments for the configuration, such as -DBUILD_TESTING=ON), and CUDA, CUDA_ARCH and CUDACXX (see
tools/toolchain.py).
"""

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import toolchain  # noqa: E402


def version() -> str:
    """The version stands in CMakeLists.txt, where the native build needs it too."""
    found = re.search(r"project\(torch_ext VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert found, "CMakeLists.txt has no project version"
    return found[1]


class CMakeBuild(build_ext):
    """One CMake build for all extensions."""

    def get_ext_filename(self, fullname: str) -> str:
        # The op library is no Python module: it keeps its plain name.
        *parents, name = fullname.split(".")
        if name == "libtorch_ext":
            return os.path.join(*parents, "libtorch_ext.so")
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        try:
            parallel = toolchain.jobs("MAX_JOBS")
            torch = toolchain.find_torch()
            nvcc = toolchain.choose_nvcc(torch)
            architectures = toolchain.architectures()
        except toolchain.BadChoice as problem:
            raise SystemExit(f"setup.py: {problem}") from None
        build = ROOT / "build" / toolchain.folder_name(torch, nvcc)
        toolchain.configure(build, torch, nvcc, architectures)
        package = Path(self.get_ext_fullpath("torch_ext._C")).resolve().parent
        toolchain.compile_into(package, build, parallel)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "torch_ext"
        for folder in ("include", "share"):
            shutil.copytree(built / folder, ROOT / "torch_ext" / folder, dirs_exist_ok=True)


setup(
    version=version(),
    # Both are declared, because an editable install copies only declared extensions.
    ext_modules=[Extension("torch_ext._C", []), Extension("torch_ext.libtorch_ext", [])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[name for name in ("cmake", "ninja") if toolchain.tool(name) is None],
)
