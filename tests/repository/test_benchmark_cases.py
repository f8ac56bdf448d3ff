"""The cases of benchmarks/run.py can be built, and ours agrees with the peers."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import run
from case import KI, Case, Missing

FOLDER = Path(run.__file__).parent / "cases"


def some_cases() -> list[Case]:
    """The first case of each module, and one for each net of those that run whole nets."""
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        cases = getattr(importlib.import_module(f"cases.{path.stem}"), "CASES", ())
        nets = [case for case in cases if case.name.endswith("call float")]
        found += nets or list(cases[:1])
    return found


@pytest.mark.parametrize("case", some_cases(), ids=lambda case: case.name)
def test_a_case_is_built_and_agrees_with_its_peers(case: Case) -> None:
    with torch.no_grad():
        try:
            job = case.build(64 * KI if case.sized else 0)
        except Missing as missing:
            pytest.skip(str(missing))
        if job.check is not None:
            job.check()
        for contender in job.contenders.values():
            contender()
