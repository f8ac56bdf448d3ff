"""Interleaved timing: each round runs every contender once, so that all see the same machine."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Run = Callable[[], object]
Clock = Callable[[], float]
# Runs a call so many times; seconds per call.
Sampler = Callable[[Run, int], float]
# Rounds whose ceiling is slower than the best one's by more than this say more about the
# neighbours of this machine than about the code.
SLOW_ROUND = 1.2
MAX_REPEATS = 2000


@dataclass(frozen=True)
class Samples:
    """Seconds per call, contender by contender and round by round."""

    seconds: dict[str, list[float]]
    kept: list[int]  # the rounds that count
    page_faults: float  # per call, over all contenders

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name][i] for i in self.kept)

    def ratio(self, name: str, ours: str) -> float:
        """How many times longer ``name`` took: the median over the rounds of each one's ratio."""
        theirs, own = self.seconds[name], self.seconds[ours]
        return statistics.median(theirs[i] / own[i] for i in self.kept)


def by_clock(clock: Clock = time.perf_counter) -> Sampler:
    """``time.thread_time`` leaves out what other programs take; it is right for one thread only."""

    def sample(run: Run, repeats: int) -> float:
        begin = clock()
        for _ in range(repeats):
            run()
        return (clock() - begin) / repeats

    return sample


def measure(
    contenders: Mapping[str, Run],
    ceilings: Mapping[str, Run],
    rounds: int,
    seconds_per_sample: float,
    sample: Sampler,
) -> Samples:
    """Runs A B ... ceiling A B ... ceiling; the ceiling is the fastest of its kinds in a round.

    A sample repeats its call until it lasts about ``seconds_per_sample``. Slow rounds (see
    SLOW_ROUND) are made up for by further ones, at most as many again.
    """
    entries = {**contenders, **ceilings}
    repeats = {name: _repeats(run, seconds_per_sample, sample) for name, run in entries.items()}
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    if ceilings:
        seconds["ceiling"] = []
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    faults, done = _page_faults(), 0
    try:
        while True:
            for name, run in entries.items():
                seconds[name].append(sample(run, repeats[name]))
            if ceilings:
                seconds["ceiling"].append(min(seconds[name][-1] for name in ceilings))
            done += 1
            kept = _kept(seconds.get("ceiling", []), done)
            if len(kept) >= rounds or done >= 2 * rounds:
                break
    finally:
        if was_enabled:
            gc.enable()
    calls = done * sum(repeats.values())
    if len(kept) < rounds // 2 + 1:
        kept = sorted(range(done), key=seconds["ceiling"].__getitem__)[: rounds // 2 + 1]
    return Samples(seconds, kept, (_page_faults() - faults) / calls)


def _kept(ceiling: list[float], done: int) -> list[int]:
    if not ceiling:
        return list(range(done))
    return [i for i, seconds in enumerate(ceiling) if seconds <= SLOW_ROUND * min(ceiling)]


def _repeats(run: Run, seconds_per_sample: float, sample: Sampler) -> int:
    """Calls that fill a sample, judged by the second call: the first one allocates and warms."""
    run()
    once = max(sample(run, 1), 1e-7)
    return max(1, min(MAX_REPEATS, round(seconds_per_sample / once)))


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
