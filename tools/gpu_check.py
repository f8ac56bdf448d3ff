"""Everything that needs a GPU, in one command of less than eight minutes: ``make gpu-check``.

    python tools/gpu_check.py [STEP...]     # default: all, in this order, the essential first
    build       for the GPU at hand, into torch_ext/, as `make` does
    parity      the tests that compare every op with the CPU, bit for bit
    sanitizer   compute-sanitizer's checkers, on a reduced set of tests
    benchmarks  the table of speeds
    tests       the rest of tests/cuda: streams, memory, faults, whole nets

Installs nothing and needs no network: this interpreter has to have torch (a CUDA build), pytest,
hypothesis and numpy. A step runs although one before it has failed, and may take its limit and what
the steps before it have left. Logs, the benchmarks' JSON and summary.{txt,json} go to $OUT, or to
build/gpu-check; the summary is written anew after every step, so that one that is killed leaves
what it found and, in its first line, what is left to do. Exits with 0, 1 where a step failed or was
not reached, 2 where something is missing that has to be installed first, and 3 where there is no
GPU: then it was only built, or without a CUDA build of torch only compiled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NoReturn

import toolchain

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check").resolve()
NEEDED = ("torch", "numpy", "pytest", "hypothesis")
# Seconds; 460 together.
LIMITS = {"build": 140, "parity": 80, "sanitizer": 80, "benchmarks": 90, "tests": 70}
PARITY = ("contract", "fake_quant", "follow", "learned", "merge", "observe", "solve", "states")
PARITY_FILES = [f"tests/cuda/test_cuda_{name}.py" for name in PARITY]
LONGEST_LOG = 4 << 20  # bytes of one program's output that are kept
PASSED = "every step passed"
CHECKERS = ("memcheck", "racecheck", "synccheck", "initcheck")

FACTS = """
import json, torch
on = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__,
    "gpu": torch.cuda.get_device_name() if on else None,
    "capability": "".join(map(str, torch.cuda.get_device_capability())) if on else None,
}))
"""


@dataclass
class Result:
    step: str
    outcome: str  # ok, failed, out of time, interrupted
    seconds: float
    last_line: str


class Interrupted(Exception):
    """Somebody ends this program: a limit of time, or Ctrl-C."""


def interrupt(number: int, frame: object) -> NoReturn:
    raise Interrupted(signal.Signals(number).name)


class Job:
    """A program under way, with its output in a file."""

    def __init__(self, name: str, command: list[str], log: Path, **environment: str) -> None:
        self.name, self.started = name, time.monotonic()
        self.log = log
        print(f"gpu-check: {name}: {' '.join(command)}", flush=True)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children can be stopped with it
            )

    def wait(self, deadline: float) -> Result:
        outcome = "out of time"
        try:
            code = self.process.wait(max(deadline - time.monotonic(), 0))
            outcome = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            self.stop()
        return self.result(outcome)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def result(self, outcome: str) -> Result:
        text = self.log.read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        if outcome != "ok":
            print(*lines[-40:], sep="\n", flush=True)
        if len(text) > LONGEST_LOG:
            half = LONGEST_LOG // 2
            self.log.write_text(f"{text[:half]}\n... left out ...\n{text[-half:]}")
        seconds = round(time.monotonic() - self.started, 1)
        return Result(self.name, outcome, seconds, lines[-1].strip() if lines else "")


class Check:
    def __init__(self, facts: Mapping[str, str | None], chosen: list[str]) -> None:
        self.facts, self.chosen = facts, chosen
        self.results: list[Result] = []
        self.undone = list(chosen)
        self.jobs: list[Job] = []  # under way
        self.end = time.monotonic() + sum(LIMITS.values())

    def deadline(self, step: str) -> float:
        """Later steps keep their limits."""
        later = list(LIMITS)[list(LIMITS).index(step) + 1 :]
        return self.end - sum(LIMITS[name] for name in later if name in self.chosen)

    def run(self, step: str, command: list[str], **environment: str) -> None:
        self.jobs = [Job(step, command, OUT / f"{step}.log", **environment)]
        self.finish(step)

    def finish(self, step: str) -> None:
        while self.jobs:
            self.results.append(self.jobs[0].wait(self.deadline(step)))
            del self.jobs[0]

    def all_steps(self) -> None:
        """With the summary after each."""
        try:
            for step in self.chosen:
                getattr(self, step)()
                self.undone.remove(step)
                self.summary()
        except Interrupted as end:
            for job in self.jobs:
                job.stop()
                self.results.append(job.result(f"interrupted ({end})"))
            self.summary()

    def build(self) -> None:
        if self.facts["cuda"] is None:
            # Not for this torch; without it the kernels can still be compiled.
            return self.run("build", [sys.executable, "tools/cuda_check.py", "--if-nvcc"])
        arguments = f"-DCMAKE_CUDA_FLAGS=-lineinfo {os.environ.get('CMAKE_ARGS', '')}"
        self.run(
            "build",
            [sys.executable, "tools/toolchain.py", "--build", "build/gpu-check-tree"],
            CUDA="1",
            CUDA_ARCH=os.environ.get("CUDA_ARCH") or self.facts["capability"] or "90",
            CMAKE_ARGS=arguments,  # with -lineinfo the sanitizer names lines
        )

    def parity(self) -> None:
        # Most of the time is the CPU's, which computes what is compared with.
        at_once = ["-n", "4"] if importlib.util.find_spec("xdist") else []
        self.pytest("parity", *at_once, *PARITY_FILES)

    def tests(self) -> None:
        self.pytest("tests", "tests/cuda", *(f"--ignore={file}" for file in PARITY_FILES))

    def pytest(self, step: str, *what: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "--durations=10", *what]
        self.run(step, command, TORCH_EXT_REQUIRE_CUDA="1")

    def sanitizer(self) -> None:
        """All checkers at once: most of their time is one host thread's."""
        found = shutil.which("compute-sanitizer", path=sanitizer_places())
        if found is None:
            self.results.append(Result("sanitizer", "failed", 0, "no compute-sanitizer was found"))
            return
        command = [found, "--error-exitcode=9", "--launch-timeout=100"]
        # Torch's own kernels are not what is checked; not every release can tell them apart.
        known = subprocess.run([found, "--help"], capture_output=True, text=True).stdout
        command += ["--kernel-regex", "kns=torch_ext"] if "--kernel-regex" in known else []
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        tests += ["-m", "sanitizer", "tests/cuda"]
        # A cached block would hide where memory ends.
        variables = {"TORCH_EXT_REQUIRE_CUDA": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        self.jobs = [
            Job(tool, [*command, "--tool", tool, *tests], OUT / f"{tool}.part", **variables)
            for tool in CHECKERS
        ]
        parts = [job.log for job in self.jobs]
        self.finish("sanitizer")
        with (OUT / "sanitizer.log").open("w") as log:
            for part in parts:
                move(part, log)

    def benchmarks(self) -> None:
        # Five rounds of all cases, as many as fit.
        command = [sys.executable, "benchmarks/run_gpu.py", "--rounds", "5", "--save"]
        self.run("benchmarks", [*command, "--out", str(OUT)])

    def closing(self) -> str:
        parts = []
        if failed := [f"{r.step} ({r.outcome})" for r in self.results if r.outcome != "ok"]:
            parts.append(f"no success: {', '.join(failed)}")
        if self.undone:
            again = f"python tools/gpu_check.py {' '.join(self.undone)}"
            parts.append(f"not done: {', '.join(self.undone)} ({again})")
        return "; ".join(parts) or PASSED

    def summary(self, closing: str | None = None) -> None:
        closing = closing or self.closing()
        rows = [("step", "outcome", "seconds", "last line")]
        rows += [(r.step, r.outcome, f"{r.seconds:.1f}", r.last_line[:100]) for r in self.results]
        width = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(r, width, strict=False)), r[3]]) for r in rows
        ]
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        head = [f"gpu-check: {closing}", when, *(f"{k}: {v}" for k, v in self.facts.items())]
        text = "\n".join([*head, "", *lines])
        (OUT / "summary.txt").write_text(text + "\n")
        steps = [asdict(result) for result in self.results]
        known = {"when": when, **self.facts, "closing": closing, "undone": self.undone}
        machine = json.dumps({**known, "steps": steps}, indent=1)
        (OUT / "summary.json").write_text(machine + "\n")
        print(f"\n{text}\n", flush=True)


def move(part: Path, log: IO[str]) -> None:
    log.write(f"==== {part.stem}\n{part.read_text(errors='replace')}\n")
    part.unlink()


def sanitizer_places() -> str:
    folders = [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = toolchain.find_nvcc()
    if nvcc:
        folders.append(str(Path(nvcc).resolve().parent))
    return os.pathsep.join([*folders, "/usr/local/cuda/compute-sanitizer"])


def main() -> int:
    chosen = sys.argv[1:] or list(LIMITS)
    for name in chosen:
        if name not in LIMITS:
            print(f'gpu-check: expected STEP to be one of {", ".join(LIMITS)}, got "{name}"')
            return 2
    chosen = [name for name in LIMITS if name in chosen]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu-check: expected {sys.executable} to have {', '.join(NEEDED)}, got no "
              f"{', '.join(missing)}; PYTHON=... names another interpreter")  # fmt: skip
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    torch = toolchain.find_torch()
    found = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True, cwd=OUT)
    if found.returncode:
        print(f"gpu-check: expected torch to be imported, got\n{found.stderr}")
        return 2
    facts = {**json.loads(found.stdout), "cuda": torch.cuda, "nvcc": toolchain.find_nvcc()}
    facts["python"] = f"{sys.version.split()[0]} ({sys.executable})"
    possible = chosen if facts["gpu"] else [name for name in chosen if name == "build"]
    check = Check(facts, possible)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    check.all_steps()
    closing = check.closing()
    code = 0 if closing == PASSED else 1
    if code == 0 and not facts["gpu"]:
        left_out = ", ".join(name for name in chosen if name not in possible)
        closing, code = f"torch finds no GPU here, so these steps did not run: {left_out}", 3
        check.summary(closing)
    print(f"gpu-check: {closing}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
