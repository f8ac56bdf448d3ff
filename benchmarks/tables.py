"""Rows of results: verdicts, the text table, the JSON record."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import native
import torch_ext
from case import Goal, Job, Peer
from timing import Samples

HEADER = (
    f"{'case':37} {'size':>5} {'thr':>3} {'ours':>9}  {'peer':30} {'its time':>9} {'ratio':>7} "
    f"{'must':>5} {'reach':>5}  {'composed':>11}  {'of ceiling':>16}  verdict"
)


@dataclass(frozen=True)
class Measured:
    """A contender's time beside ours, and the goal for that ratio."""

    name: str
    seconds: float
    ratio: float
    must: float | None
    reach: float | None

    @property
    def holds(self) -> bool:
        return self.must is None or self.ratio >= self.must

    @property
    def reaches(self) -> bool:
        return self.reach is None or self.ratio >= self.reach


@dataclass(frozen=True)
class Row:
    case: str
    size: int  # elements; 0: an input of the case's own
    threads: int  # 0: on a GPU
    seconds: float  # ours, per item
    peer: Measured | None
    composed: Measured | None
    ceiling: Measured | None  # its ratio is the fraction of the ceiling that ours reaches
    bound: float | None  # the peer's time over the ceiling's: no code can have a higher ratio
    rounds: int
    rounds_kept: int
    page_faults: float

    def parts(self) -> list[Measured]:
        return [part for part in (self.peer, self.composed, self.ceiling) if part is not None]

    @property
    def verdict(self) -> str:
        """``not met``, ``met``, ``reach``, or nothing where no goal is set."""
        judged = [part for part in self.parts() if part.must is not None]
        if not judged:
            return ""
        missed = [part for part in judged if not part.holds]
        if missed:
            return "not met: " + ", ".join(self._missing(part) for part in missed)
        return "reach" if all(part.reaches for part in judged) else "met"

    def _missing(self, part: Measured) -> str:
        if part is self.composed:
            return "composed"
        if part is self.ceiling:
            return "ceiling"
        if part.must is not None and self.bound is not None and self.bound < part.must:
            return f"ratio (at most {_number(self.bound)})"
        return "ratio"


def rows_of(case: str, size: int, threads: int, job: Job, samples: Samples) -> list[Row]:
    """One row per peer; the composition and the ceiling stand in the first."""
    key = (size, threads)

    def measured(name: str, label: str, goal: Goal | None, items: int | None = None) -> Measured:
        did = items or job.items
        return Measured(
            label,
            samples.median(name) / did,
            samples.ratio(name, "ours") * job.items / did,
            goal.must if goal else None,
            goal.reach if goal else None,
        )

    def contender(peer: Peer) -> Measured:
        return measured(peer.name, peer.name, peer.goals.get(key), peer.items)

    composed = contender(job.composed) if job.composed else None
    ceiling = None
    if job.ceiling:
        ceiling = measured("ceiling", job.ceiling.kind, job.ceiling.goals.get(key))
    peers: list[Measured | None] = [contender(peer) for peer in job.peers]
    return [
        Row(
            case=case,
            size=size,
            threads=threads,
            seconds=samples.median("ours") / job.items,
            peer=peer,
            composed=None if i else composed,
            ceiling=None if i else ceiling,
            bound=samples.ratio(peer.name, "ceiling") if peer and job.ceiling else None,
            rounds=len(samples.seconds["ours"]),
            rounds_kept=len(samples.kept),
            page_faults=samples.page_faults,
        )
        for i, peer in enumerate(peers or [None])
    ]


def size_name(size: int) -> str:
    for unit, factor in (("Mi", 1 << 20), ("Ki", 1 << 10)):
        if size >= factor and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size) if size else "-"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    if seconds < 1e-7:
        return f"{seconds * 1e9:.3g} ns"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _with_must(part: Measured | None, of: str = "") -> str:
    if part is None:
        return "-"
    must = "" if part.must is None else f" ({_number(part.must)})"
    return f"{part.ratio:.2f}{of}{must}"


def line(row: Row) -> str:
    """A row of the table; a number in brackets is what must hold."""
    peer = row.peer
    ceiling = f" {row.ceiling.name}" if row.ceiling else ""
    return (
        f"{row.case:37} {size_name(row.size):>5} {row.threads or '-':>3} {_time(row.seconds):>9}  "
        f"{peer.name if peer else '-':30} {_time(peer.seconds) if peer else '-':>9} "
        f"{_number(peer.ratio if peer else None):>7} {_number(peer.must if peer else None):>5} "
        f"{_number(peer.reach if peer else None):>5}  {_with_must(row.composed):>11}  "
        f"{_with_must(row.ceiling, ceiling):>16}  {row.verdict}"
    ).rstrip()


def summary(rows: Sequence[Row]) -> str:
    judged = [row for row in rows if row.verdict]
    missed = [row for row in judged if row.verdict.startswith("not met")]
    reached = sum(row.verdict == "reach" for row in judged)
    text = f"{len(judged) - len(missed)} of {len(judged)} musts met, {reached} at the aim"
    for row in missed:
        where = f"{row.case}, {size_name(row.size)}"
        where += f", {row.threads} thread(s)" if row.threads else ""
        text += f"\n  {where:55} {row.verdict}"
    return text


def first_line(*command: str) -> str:
    """Of what a program prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=native.FOLDER, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


def machine() -> dict[str, str]:
    """What a result depends on."""
    versions = {"torch": str(torch.__version__)}
    for package in ("numpy", "onnxruntime"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    info = torch_ext.build_info()
    commit = first_line("git", "describe", "--always", "--dirty")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": native.cpu_model(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
        "torch_ext": f"{info['version']} {commit}".strip(),
        "kernels": str(info["cpu_capability"]),
        "compiler": first_line(native.compiler(), "--version") or native.compiler(),
    }


def as_json(about: dict[str, str], rows: Sequence[Row], notes: Sequence[str]) -> str:
    table = [{**asdict(row), "verdict": row.verdict} for row in rows]
    return json.dumps({"machine": about, "rows": table, "notes": list(notes)}, indent=1) + "\n"


def as_text(about: dict[str, str], rows: Sequence[Row], notes: Sequence[str]) -> str:
    head = "\n".join(f"{key:12} {value}" for key, value in about.items())
    body = "\n".join([HEADER, *(line(row) for row in rows)])
    tail = "\n".join([summary(rows), *notes])
    return f"{head}\n\n{body}\n\n{tail}\n"


def write(
    folder: Path, stem: str, about: dict[str, str], rows: list[Row], notes: list[str]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(as_json(about, rows, notes))
    (folder / f"{stem}.txt").write_text(as_text(about, rows, notes))


def slug(text: str) -> str:
    """A part of a file's name."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))
