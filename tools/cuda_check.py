"""Compiles every CUDA source without torch and shows what each kernel takes: ``make cuda-check``.

    python tools/cuda_check.py [--if-nvcc]
    --if-nvcc  a machine without nvcc is none to complain about

For sm_90, or for the architectures in CUDA_ARCH. A kernel that spills registers is a failure, and
so is a warning. What has not changed since is not compiled again: build/cuda-check holds the logs.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import toolchain

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "cuda-check"

LONGEST_NAME = 60

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?\b(\d+) bytes smem)?")


@dataclass
class Row:
    """What ptxas says of one kernel, or of a function that a kernel calls."""

    name: str
    architecture: str
    registers: int | None = None
    spills: int = 0  # bytes, stores and loads
    shared: int = 0  # bytes, static
    stack: int = 0  # bytes


def parse(log: str) -> list[Row]:
    rows: list[Row] = []
    entry = function = None
    for line in log.splitlines():
        if found := ENTRY.search(line):
            entry = function = Row(found[1], found[2])
            rows.append(entry)
        elif (found := PROPERTIES.search(line)) and entry:
            function = entry if found[1] == entry.name else Row(found[1], entry.architecture)
            rows += [] if function is entry else [function]
        elif (found := FRAME.search(line)) and function:
            function.stack = int(found[1])
            function.spills = int(found[2]) + int(found[3])
        elif (found := USED.search(line)) and entry:
            entry.registers, entry.shared = int(found[1]), int(found[2] or 0)
    return rows


def readable(names: list[str]) -> list[str]:
    """Without what is the same everywhere: torch_ext::gpu::run<KERNEL>(KERNEL) becomes KERNEL."""
    if shutil.which("c++filt"):
        done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
        names = done.stdout.splitlines()
    short = []
    for name in names:
        name = re.sub(
            r"\(anonymous namespace\)::|_(GLOBAL__N_|INTERNAL)_\w+?::|torch_ext::|cuda::|^auto ",
            "",
            name,
        )
        # nvcc puts the file's name into that of the anonymous namespace.
        kernel = re.fullmatch(r"void gpu::run<(.*)>\(.*\)", name)
        name = kernel[1].strip() if kernel else name
        short.append(name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "...")
    return short


def table(rows: list[Row]) -> str:
    head = ("kernel", "for", "registers", "spills", "shared", "stack")
    cells = [
        (
            name,
            r.architecture,
            "" if r.registers is None else r.registers,
            r.spills,
            r.shared,
            r.stack,
        )
        for name, r in zip(readable([r.name for r in rows]), rows, strict=True)
    ]
    lines = [list(map(str, line)) for line in (head, *cells)]
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(line))
        for line in (zip(row, width, strict=True) for row in lines)
    )


def cmake_list(name: str) -> list[str]:
    found = re.search(rf"set\({name}\s+([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found, f"CMakeLists.txt has no {name}"
    return found[1].split()


def command(nvcc: str, architecture: str) -> list[str]:
    words = [nvcc, "-std=c++20", "-O3", "-Icsrc", "-Icsrc/cuda/device", "-Xptxas=-v", "-c"]
    words += [*cmake_list("TORCH_EXT_CUDA_FLAGS"), "-Xcompiler=-Werror", "-Werror=all-warnings"]
    number = architecture.split("-")[0]
    return [*words, f"-gencode=arch=compute_{number},code=sm_{number}"]


def digest(path: str) -> str | None:
    file = ROOT / path
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def dependencies(makefile: str) -> Iterator[str]:
    """Those in the source tree; a change of the toolkit shows in its version."""
    for word in makefile.split(":", 1)[1].replace("\\\n", " ").split():
        path = (ROOT / word).resolve()
        if path.is_relative_to(ROOT):
            yield str(path.relative_to(ROOT))


def compile_source(nvcc: str, version: str, source: str, architecture: str) -> tuple[bool, str]:
    """Whether it compiles, and the log; from the cache where all it depends on is the same."""
    words = command(nvcc, architecture)
    note = (
        CACHE / f"{Path(source).stem}-{hashlib.sha256(repr(words).encode()).hexdigest()[:12]}.json"
    )
    if note.is_file():
        known = json.loads(note.read_text())
        if known["version"] == version and all(digest(p) == d for p, d in known["files"].items()):
            return True, known["log"]
    with tempfile.TemporaryDirectory() as scratch:
        made = ["-o", f"{scratch}/object", "-MD", "-MF", f"{scratch}/makefile"]
        done = subprocess.run([*words, source, *made], cwd=ROOT, capture_output=True, text=True)
        log = done.stdout + done.stderr
        if done.returncode == 0:
            files = {p: digest(p) for p in dependencies(Path(scratch, "makefile").read_text())}
            note.write_text(json.dumps({"version": version, "files": files, "log": log}))
    return done.returncode == 0, log


def check(nvcc: str) -> str:
    """The closing line; exits where something is wrong."""
    listed = cmake_list("TORCH_EXT_CUDA_SOURCES")
    # The longest first, so that the others fill the other cores meanwhile.
    by_size = sorted(ROOT.glob("csrc/cuda/**/*.cu"), key=lambda p: (-p.stat().st_size, p))
    present = [str(p.relative_to(ROOT)) for p in by_size]
    problems = [f"{p} is in the list of CMakeLists.txt or in the tree, not in both"
                for p in sorted(set(listed) ^ set(present))]  # fmt: skip
    CACHE.mkdir(parents=True, exist_ok=True)
    version = toolchain.nvcc_release(nvcc)
    pairs = list(product(present, toolchain.architectures() or ["90"]))
    with ThreadPoolExecutor(toolchain.jobs("JOBS")) as pool:
        done = list(pool.map(lambda pair: compile_source(nvcc, version, *pair), pairs))
    rows: list[Row] = []
    for (source, _), (compiled, log) in zip(pairs, done, strict=True):
        found = parse(log)
        rows += found
        if not compiled:
            problems.append(f"{source} does not compile:\n{log}")
        for row in found:
            if row.spills:
                name = readable([row.name])[0]
                problems.append(
                    f"{source}: {name} spills {row.spills} bytes for {row.architecture}"
                )
    if not rows:
        problems.append("no kernel was found")
    print(table(rows))
    if problems:
        sys.exit("\n".join(f"cuda-check: {problem}" for problem in problems))
    return f"cuda-check: {len(rows)} kernels in {len(present)} files, no spills"


def main() -> None:
    try:
        nvcc = toolchain.find_nvcc()
        if nvcc is None:
            print("cuda-check: no nvcc in PATH, CUDA_HOME or /usr/local/cuda: nothing was compiled")
            sys.exit(0 if "--if-nvcc" in sys.argv[1:] else 2)
        print(check(nvcc))
    except toolchain.BadChoice as problem:
        print(f"cuda-check: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
