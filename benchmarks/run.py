"""Times torch_ext side by side with what else does the same: ``make bench``."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from typing import TYPE_CHECKING

import options

if TYPE_CHECKING:
    from case import Case, Job
    from tables import Row
    from timing import Samples

# Both sides get memory that has been touched before: a fresh 64 MiB costs ten times what an op on
# it does, and would hide the op. The C library reads these once, when a process starts.
RECYCLED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
MANY_FAULTS = 64  # per call: memory was fresh after all
TENSORS_AT_ONCE = 12  # of the largest size, that a case holds
MOST_TOUCHED = 1 << 30


def start_again_with_recycled_memory() -> None:
    if any(os.environ.get(name) != value for name, value in RECYCLED_MEMORY.items()):
        environment = {**os.environ, **RECYCLED_MEMORY}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def touch_memory(elements: int) -> None:
    """Has the allocator own what the cases will need: freed memory stays with it."""
    import torch

    size = min(4 * TENSORS_AT_ONCE * elements, MOST_TOUCHED)
    torch.empty(size, dtype=torch.uint8).fill_(1)


def choose(cases: list[Case], pattern: str | None, program: str = "run.py") -> list[Case]:
    if pattern is None:
        return cases
    found = [c for c in cases if pattern in c.name or fnmatch.fnmatchcase(c.name, pattern)]
    if not found:
        known = "\n  ".join(case.name for case in cases)
        sys.exit(f'{program}: expected --only to match a case, got "{pattern}"; known:\n  {known}')
    return found


class Session:
    """Runs cases and prints their rows as they come."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.failed = False

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            print(f"  {text}", flush=True)

    def run(self, case: Case) -> None:
        for size in self.chosen.sizes if case.sized else [0]:
            for threads in self.chosen.threads:
                if case.threads is None or threads in case.threads:
                    self._run_at(case, size, threads)

    def _measure(self, job: Job, first: bool) -> Samples:
        import native
        import timing

        if job.check is not None and first:
            job.check()
        ceilings = native.ceilings(job.ceiling.kind, job.ceiling.x) if job.ceiling else {}
        clock = time.thread_time if self.chosen.cpu_time else time.perf_counter
        return timing.measure(
            job.contenders,
            ceilings,
            self.chosen.rounds,
            self.chosen.seconds_per_sample,
            timing.by_clock(clock),
        )

    def _run_at(self, case: Case, size: int, threads: int) -> None:
        import torch

        import tables
        from case import Missing

        if threads:
            torch.set_num_threads(threads)
        try:
            job = case.build(size)
            samples = self._measure(job, threads == self.chosen.threads[0])
        except Missing as missing:
            self.note(f"left out: {case.name}: {missing}")
            return
        except Exception as error:
            self.failed = True
            self.note(f"FAILED: {case.name}: {type(error).__name__}: {error}")
            return
        found = tables.rows_of(case.name, size, threads, job, samples)
        for row in found:
            print(tables.line(row), flush=True)
        self.rows += found
        if threads and samples.page_faults > MANY_FAULTS:
            self.note(f"fresh memory: {samples.page_faults:.0f} page faults a call in {case.name}")


def main() -> int:
    chosen = options.parse()
    start_again_with_recycled_memory()
    import torch

    import native
    import tables
    from cases import (
        dynamic,
        fake_quant,
        insertion,
        learned,
        observe,
        observe_sizes,
        solve,
        steps,
        training,
    )

    cases = [
        *observe.CASES,
        *observe_sizes.CASES,
        *fake_quant.CASES,
        *dynamic.CASES,
        *steps.CASES,
        *learned.CASES,
        *solve.CASES,
        *training.CASES,
        *insertion.CASES,
    ]
    cases = choose(cases, chosen.only)
    if chosen.list:
        print("\n".join(case.name for case in cases))
        return 0
    begin = time.monotonic()
    torch.set_grad_enabled(False)
    about = tables.machine()
    about["rounds"] = str(chosen.rounds)
    about["clock"] = "CPU time of the thread" if chosen.cpu_time else "wall"
    print("\n".join(f"{key:12} {value}" for key, value in about.items()))
    print(f"\n{tables.HEADER}")
    touch_memory(max(chosen.sizes))
    session = Session(chosen)
    for case in cases:
        session.run(case)
    print(f"\n{tables.summary(session.rows)}")
    print(f"{time.monotonic() - begin:.0f} s")
    record = (about, session.rows, session.notes)
    tables.write(native.OUTPUT, "latest", *record)
    print(f"written: {native.OUTPUT / 'latest.json'}, .txt")
    if chosen.save and not session.failed:
        stem = f"{about['date']}-{tables.slug(about['cpu'])}"
        tables.write(native.FOLDER / "results", stem, *record)
        print(f"written: {native.FOLDER / 'results' / stem}.json, .txt")
    return 1 if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
