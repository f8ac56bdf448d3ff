"""Times torch_ext's CUDA kernels side by side with what else does the same.

python benchmarks/run_gpu.py --save [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

import native
import options
import run
import tables
import timing
import torch_ext
from case import Job
from gpu import cases as gpu_cases
from gpu import native as gpu_native
from gpu import solve as gpu_solve
from gpu import timing as gpu_timing
from timing import Sampler, Samples

NO_GPU = 3  # the exit code where there is nothing to measure
DRIFT = 1.05  # how much slower or faster the memory may be at the end than at the beginning
WARM_UP_SECONDS = 0.5
DRIVER = ("--query-gpu=driver_version", "--format=csv,noheader")


def missing() -> str | None:
    """Why nothing can be measured."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch_ext.build_info()["cuda"]:
        return "a build of torch_ext without CUDA kernels"
    return None


def parse() -> argparse.Namespace:
    """sizes, only, rounds, quick, list, save, out; threads and seconds_per_sample with them."""
    parser = argparse.ArgumentParser("run_gpu.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="3 rounds, sizes 1Mi,64Mi")
    parser.add_argument(
        "--sizes", type=options.parse_sizes, help=f"in elements, default: {gpu_cases.SIZES}"
    )
    parser.add_argument("--only", metavar="PATTERN", help="the cases to run")
    parser.add_argument("--rounds", type=options.parse_rounds, help="default: 7")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--save", action="store_true", help="write into benchmarks/results/")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT") or None, help="and here; default: $OUT"
    )
    chosen = parser.parse_args()
    if chosen.save and (chosen.quick or chosen.only):
        parser.error("argument --save: expected a run of everything, got --quick or --only")
    if chosen.sizes is None:
        chosen.sizes = options.parse_sizes("1Mi,64Mi" if chosen.quick else gpu_cases.SIZES)
    if chosen.rounds is None:
        chosen.rounds = 3 if chosen.quick else options.FEWEST_ROUNDS
    chosen.threads, chosen.seconds_per_sample = [0], 0.003
    return chosen


def machine(device: torch.device) -> dict[str, str]:
    """What a result depends on, the device first."""
    found = torch.cuda.get_device_properties(device)
    host = tables.machine()
    about = {
        "date": host["date"],
        "device": found.name,
        "memory": f"{found.total_memory / 2**30:.0f} GiB",
        "capability": f"{found.major}.{found.minor}",
        "processors": str(found.multi_processor_count),
        "driver": tables.first_line("nvidia-smi", *DRIVER) or "unknown",
        "CUDA of torch": str(torch.version.cuda),
        "nvcc": gpu_native.compiler() or "none",
    }
    return about | {k: v for k, v in host.items() if k not in about}


class Session(run.Session):
    """As on the CPU, with another timer, buffers that rotate, and ceilings of the device."""

    def __init__(self, chosen: argparse.Namespace, sampler: Sampler) -> None:
        super().__init__(chosen)
        self.sampler = sampler

    def _measure(self, job: Job, first: bool) -> Samples:
        if job.check is not None:
            job.check()
        ceilings = {}
        if job.ceiling is not None:
            ceilings = gpu_native.ceilings(job.ceiling.kind, list(job.ceiling.x.unbind(0)))
        chosen = self.chosen
        return timing.measure(
            job.contenders, ceilings, chosen.rounds, chosen.seconds_per_sample, self.sampler
        )

    def bandwidth(self, device: torch.device, size: int) -> dict[str, float]:
        """Bytes per second of each ceiling, reading and writing both counted."""
        x = torch.ones(1, size, device=device)
        found = {}
        for kind, passes in {"read": 1, "copy": 2, "2r1w": 3}.items():
            ways = gpu_native.ceilings(kind, [x[0]]).values()
            seconds = min(self.sampler(way, 5) for way in ways for _ in range(3))
            found[kind] = passes * x.nbytes / seconds
        return found


def drift(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """A line for the record, and a warning where the machine changed while it measured."""
    shown = {k: f"{before[k] / 1e9:.0f} then {after[k] / 1e9:.0f} GB/s" for k in before}
    notes = [
        "ceilings at the beginning and the end: " + ", ".join(f"{k} {v}" for k, v in shown.items())
    ]
    for kind in before:
        change = max(before[kind], after[kind]) / min(before[kind], after[kind])
        if change > DRIFT:
            notes.append(f"DRIFT: the {kind} ceiling changed by {100 * (change - 1):.0f} %")
    return notes


def warm_up(device: torch.device) -> None:
    """Until the clocks have risen."""
    x = torch.ones(1 << 26, device=device)
    end = time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < end:
        x.mul_(1.0)
        torch.cuda.synchronize(device)


def write(
    chosen: argparse.Namespace, record: tuple[dict[str, str], list[tables.Row], list[str]]
) -> None:
    about = record[0]
    stem = f"{about['date']}-{tables.slug(about['device'])}"
    folders = [native.OUTPUT]
    folders += [native.FOLDER / "results"] if chosen.save else []
    folders += [chosen.out] if chosen.out is not None else []
    for folder in folders:
        tables.write(Path(folder), stem, *record)
        print(f"written: {Path(folder) / stem}.json, .txt")


def main() -> int:
    chosen = parse()
    why = missing()
    if why is not None and not chosen.list:
        print(f"run_gpu.py: {why}: nothing to measure", file=sys.stderr)
        return NO_GPU
    device = torch.device("cuda" if why is None else "cpu")
    cases = [*gpu_cases.cases(device), *gpu_solve.cases(device)]
    cases = run.choose(cases, chosen.only, "run_gpu.py")
    if chosen.list:
        print("\n".join(case.name for case in cases))
        return 0
    begin = time.monotonic()
    torch.set_grad_enabled(False)
    about = machine(device) | {"rounds": str(chosen.rounds), "clock": "CUDA events"}
    print("\n".join(f"{key:14} {value}" for key, value in about.items()))
    session = Session(chosen, gpu_timing.by_events(device))
    warm_up(device)
    before = session.bandwidth(device, max(chosen.sizes))
    print(f"\n{tables.HEADER}")
    for case in cases:
        session.run(case)
        torch.cuda.empty_cache()
    for text in drift(before, session.bandwidth(device, max(chosen.sizes))):
        session.note(text)
    print(f"\n{tables.summary(session.rows)}")
    print(f"{time.monotonic() - begin:.0f} s")
    write(chosen, (about, session.rows, session.notes))
    return 1 if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
