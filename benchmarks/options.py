"""The command line of run.py: what may be asked for, and what is refused."""

from __future__ import annotations

import argparse
import os
import re

SIZES = "64Ki,1Mi,16Mi"
QUICK_SIZES = "64Ki,1Mi"
MAX_SIZE = 1 << 28
ROW = 4096  # the longest row of a per-channel case
UNITS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20}
FEWEST_ROUNDS = 7  # that a median to be kept is taken over

USAGE = """
  python benchmarks/run.py                        everything, a few minutes
  python benchmarks/run.py --quick                three rounds, without the largest size
  python benchmarks/run.py --only kl --threads 1  cases whose name holds this, or matches kl/*
  python benchmarks/run.py --cpu-time             where other programs run: one thread's own time
  python benchmarks/run.py --save                 a record in benchmarks/results/ as well

How it is measured, and how to read the table: README.md beside this file.
"""


def _refuse(want: str, have: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f'expected {want}, got "{have}"')


def parse_sizes(text: str) -> list[int]:
    want = f"multiples of {ROW} up to {MAX_SIZE >> 20}Mi such as {SIZES}"
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(|Ki|Mi)", part.strip())
        size = int(match[1]) * UNITS[match[2]] if match else 0
        if not ROW <= size <= MAX_SIZE or size % ROW:
            raise _refuse(want, text)
        sizes.append(size)
    return list(dict.fromkeys(sizes))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads(text: str) -> list[int]:
    counts = []
    for part in text.split(","):
        digits = part.strip()
        if not re.fullmatch(r"[0-9]{1,4}", digits) or not 1 <= int(digits) <= _cores():
            raise _refuse(f"numbers of threads from 1 to {_cores()} such as 1,2", text)
        counts.append(int(digits))
    return list(dict.fromkeys(counts))


def parse_rounds(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= 100:
        raise _refuse("a number of rounds from 1 to 100", text)
    return int(text)


def parse() -> argparse.Namespace:
    """quick, threads, sizes, only, rounds, cpu_time, list, save; seconds_per_sample with them."""
    parser = argparse.ArgumentParser(
        "run.py",
        description="Times torch_ext side by side with what else does the same.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help=f"3 rounds, sizes {QUICK_SIZES}")
    parser.add_argument("--threads", type=_threads, help="default: 1,2")
    parser.add_argument("--sizes", type=parse_sizes, help=f"in elements, default: {SIZES}")
    parser.add_argument("--only", metavar="PATTERN", help="the cases to run")
    parser.add_argument("--rounds", type=parse_rounds, help="default: 9")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread's own time: for a busy machine"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--save", action="store_true", help="write into benchmarks/results/")
    chosen = parser.parse_args()
    if chosen.save:
        for option in ("quick", "only", "cpu-time"):
            if getattr(chosen, option.replace("-", "_")):
                parser.error(f"argument --save: expected a run of everything, got --{option}")
        if chosen.rounds is not None and chosen.rounds < FEWEST_ROUNDS:
            parser.error(
                f"argument --save: expected --rounds to be {FEWEST_ROUNDS} or more, "
                f"got {chosen.rounds}"
            )
    if chosen.sizes is None:
        chosen.sizes = parse_sizes(QUICK_SIZES if chosen.quick else SIZES)
    if chosen.threads is None:
        chosen.threads = [1, 2] if _cores() > 1 and not chosen.cpu_time else [1]
    if chosen.cpu_time and chosen.threads != [1]:
        given = ",".join(map(str, chosen.threads))
        parser.error(f'argument --cpu-time: expected --threads to be 1, got "{given}"')
    if chosen.rounds is None:
        chosen.rounds = 3 if chosen.quick else 9
    chosen.seconds_per_sample = 0.001 if chosen.quick else 0.004
    return chosen
