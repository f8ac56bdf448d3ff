"""What a benchmark is: our call, its peers, the ceiling, and the goals that hold it to account."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Run = Callable[[], object]

KI, MI = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Goal:
    """A ratio that must hold, and the one that is aimed for."""

    must: float
    reach: float


# By (elements, threads); the size is 0 where a case has an input of its own, threads on a GPU.
Goals = Mapping[tuple[int, int], Goal]
NONE: Goals = {}


@dataclass(frozen=True)
class Peer:
    """Another way to do the same; ``goals`` are about its time divided by ours.

    ``items``: how many of the job's things one call of it does, where it would take too long to do
    them all; None: all.
    """

    name: str
    run: Run
    goals: Goals = field(default_factory=dict)
    items: int | None = None


@dataclass(frozen=True)
class Ceiling:
    """Memory bandwidth: reading x or copying it; ``goals`` are about its time divided by ours."""

    kind: str
    x: Tensor
    goals: Goals = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One case at one size, ready to be timed.

    ``composed`` is the best that a user of Torch can put together from vectorised ops writing into
    reused memory. ``check`` raises where ours and a peer do not compute the same. ``items``: how
    many things one call does; times are given per thing.
    """

    ours: Run
    peers: tuple[Peer, ...] = ()
    composed: Peer | None = None
    ceiling: Ceiling | None = None
    check: Run | None = None
    items: int = 1

    @property
    def contenders(self) -> dict[str, Run]:
        """Ours and all others, by name."""
        others = [*self.peers, *([self.composed] if self.composed else [])]
        return {"ours": self.ours, **{peer.name: peer.run for peer in others}}


@dataclass(frozen=True)
class Case:
    """A named benchmark. ``build(size)`` makes its job with the number of threads already set."""

    name: str
    build: Callable[[int], Job]
    sized: bool = True  # False: the input is the case's own, and `size` is 0
    threads: tuple[int, ...] | None = None  # only these; None: whatever was asked for


class Missing(Exception):
    """A case cannot run for want of an optional package; the text says which."""


def goals(*rows: tuple[int, int, float, float]) -> Goals:
    """Rows of elements, threads, must, reach."""
    return {(size, threads): Goal(must, reach) for size, threads, must, reach in rows}


def expect(holds: bool, what: str) -> None:
    """For ``check``: the benchmark compares two programs only if they do the same."""
    if not holds:
        raise RuntimeError(f"ours and the peer disagree: {what}")
