"""What the native build is made for and with: the installed torch, nvcc, architectures.

setup.py and the programs beside this one import it. tools/setup.sh runs it for the answer as three
lines: the build folder's name, nvcc's path, which is empty where the kernels are not built, and
NVCC_APPEND_FLAGS for the build.
    python tools/toolchain.py [--values | --configure FOLDER | --build FOLDER]
    --values     only say whether the variables have sensible values
    --configure  have CMake write its files into that folder
    --build      configure and build in that folder, and put the libraries into torch_ext/

Variables: CUDA (1 or 0; unset, the kernels are built where torch is a CUDA build and nvcc is found)
and CUDA_ARCH (compute capabilities, such as 90 or 80,90). nvcc is CUDACXX, or looked for in PATH,
CUDA_HOME/bin and /usr/local/cuda/bin.
"""

from __future__ import annotations

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
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OLDEST_TORCH = (2, 11)
OLDEST_ARCHITECTURE = 80
USUAL_FOLDER = "/usr/local/cuda/bin"
ARCHITECTURE = re.compile(r"(\d{2,3})[af]?(-real|-virtual)?")


class BadChoice(Exception):
    """Something that the caller chose, or that is installed, does not fit."""


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: str | None  # the release of CUDA that it was built with


def tool(name: str) -> str | None:
    """Path of a build tool: beside the interpreter, for a venv that is not active, or in PATH."""
    beside = os.path.dirname(sys.executable)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))


def jobs(variable: str) -> int:
    text = os.environ.get(variable, "").strip() or str(os.cpu_count() or 1)
    if not text.isdecimal() or int(text) < 1:
        raise BadChoice(f"expected {variable} to be a positive number, got {text!r}")
    return int(text)


def find_torch() -> Torch:
    """The Torch to build against: the one that will load the libraries.

    pip builds in an isolated environment without Torch unless told --no-build-isolation; the
    environment that pip installs into is then found through sysconfig.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    for folder in folders:
        if (folder / "version.py").is_file() and (folder / "include").is_dir():
            facts = runpy.run_path(str(folder / "version.py"))
            found = facts["__version__"]
            release = re.match(r"(\d+)\.(\d+)", found)
            if not release or tuple(map(int, release.groups())) < OLDEST_TORCH:
                wanted = ".".join(map(str, OLDEST_TORCH))
                raise BadChoice(f"expected torch to be {wanted} or newer, got {found}")
            return Torch(folder, found, facts.get("cuda"))
    raise BadChoice(
        f"expected torch to be installed for {sys.executable}, got none; "
        "install torch first, then build with --no-build-isolation"
    )


def find_nvcc() -> str | None:
    named = os.environ.get("CUDACXX", "").strip()
    folders = [os.environ.get("PATH", os.defpath)]
    folders += [
        f"{os.environ[home]}/bin" for home in ("CUDA_HOME", "CUDA_PATH") if home in os.environ
    ]
    return shutil.which(named or "nvcc", path=os.pathsep.join([*folders, USUAL_FOLDER]))


def nvcc_release(nvcc: str) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    if done.returncode or not found:
        raise BadChoice(f"expected {nvcc} --version to name a release, got {done.stdout.strip()!r}")
    return found[1]


def cuda_wanted() -> bool | None:
    value = os.environ.get("CUDA", "").strip()
    if value not in ("", "0", "1"):
        raise BadChoice(f'expected CUDA to be 0 or 1, got "{value}"')
    return None if value == "" else value == "1"


def architectures() -> list[str]:
    """In CMake's words. None: what CMakeLists.txt builds for."""
    value = os.environ.get("CUDA_ARCH", "").strip()
    names = re.split("[,;]", value) if value else []
    for name in names:
        found = ARCHITECTURE.fullmatch(name)
        if not found or int(found[1]) < OLDEST_ARCHITECTURE:
            raise BadChoice(
                f"expected CUDA_ARCH to be compute capabilities from {OLDEST_ARCHITECTURE} on "
                f'such as 80,90, got "{value}"'
            )
    return names


def choose_nvcc(torch: Torch) -> str | None:
    """The compiler for the kernels, or None for a build without them."""
    wanted = cuda_wanted()
    if wanted is False:
        return None
    problem = ""
    nvcc = None
    if torch.cuda is None:
        problem = f"expected torch to be a CUDA build, got {torch.version}"
    else:
        nvcc = find_nvcc()
        if nvcc is None:
            problem = "expected nvcc to be in PATH, CUDA_HOME or /usr/local/cuda, got none"
        elif nvcc_release(nvcc).split(".")[0] != torch.cuda.split(".")[0]:
            # The library has to run on the CUDA run time that torch brings along.
            problem = (
                f"expected nvcc to be of CUDA {torch.cuda.split('.')[0]}, as torch {torch.version} "
                f"is, got {nvcc_release(nvcc)} ({nvcc})"
            )
    if problem and wanted:
        raise BadChoice(f"{problem}; CUDA=0 builds for the CPU alone")
    return None if problem else nvcc


def folder_name(torch: Torch, nvcc: str | None) -> str:
    return f"torch-{torch.version}" + ("-cuda" if nvcc else "")


def configure(build: Path, torch: Torch, nvcc: str | None, names: list[str]) -> None:
    command = [tool("cmake") or "cmake", "-S", str(ROOT), "-B", str(build), "-GNinja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja') or 'ninja'}"]
    command += [f"-DPython3_EXECUTABLE={sys.executable}", f"-DTORCH_ROOT={torch.folder}"]
    command += [f"-DTORCH_EXT_CUDA={'ON' if nvcc else 'OFF'}"]
    if nvcc:
        command += [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
        # Without names: what an earlier configuration was told is forgotten.
        said = f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(names)}"
        command += [said if names else "-UCMAKE_CUDA_ARCHITECTURES"]
    subprocess.check_call(command + shlex.split(os.environ.get("CMAKE_ARGS", "")))


def nvcc_flags(jobs: int) -> str:
    """nvcc compiles one file for all architectures one after the other, unless it is told.

    In its environment and not among CMake's flags, where another number of jobs would mean another
    build. All files are compiled at once where there are cores enough, each with so many threads;
    a fourth of them keeps memory in bounds.
    """
    threads = max(min(jobs, 2), jobs // 4)
    return f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --threads {threads}".strip()


def compile_into(package: Path, build: Path, jobs: int) -> None:
    cmake = tool("cmake") or "cmake"
    environment = {**os.environ, "NVCC_APPEND_FLAGS": nvcc_flags(jobs)}
    command = [cmake, "--build", str(build), "--parallel", str(jobs)]
    subprocess.check_call(command, env=environment)
    subprocess.check_call([cmake, "--install", str(build), "--prefix", str(package)])


def main(arguments: list[str]) -> None:
    cuda_wanted()
    names = architectures()
    if arguments == ["--values"]:
        return
    torch = find_torch()
    nvcc = choose_nvcc(torch)
    if arguments[:1] in (["--configure"], ["--build"]):
        build = ROOT / arguments[1]
        configure(build, torch, nvcc, names)
    if arguments[:1] == ["--build"]:
        compile_into(ROOT / "torch_ext", build, jobs("JOBS"))
    if not arguments:
        print(folder_name(torch, nvcc), nvcc or "", nvcc_flags(jobs("JOBS")), sep="\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BadChoice as problem:
        print(f"make: {problem}", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as problem:
        sys.exit(problem.returncode)
