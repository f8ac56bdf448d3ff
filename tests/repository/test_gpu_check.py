"""make gpu-check without a GPU: how far it goes, and its steps with stand-ins for what they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu_check
from paths import ROOT

# Stands in for compute-sanitizer: racecheck finds something, initcheck never ends.
SANITIZER = """#!/bin/sh
echo "$@"
[ "$1" != --help ] || echo "  --kernel-regex arg"
case "$*" in *racecheck*) exit 9;; *initcheck*) sleep 60;; esac
"""
FACTS = {"torch": "2.14.1+cu130", "gpu": "Some GPU", "capability": "90", "cuda": "13.0", "nvcc": ""}


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu_check.Check:
    monkeypatch.setattr(gpu_check, "OUT", tmp_path)
    return gpu_check.Check(FACTS, list(gpu_check.LIMITS))


def run(out: Path, *steps: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUT": str(out), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tools/gpu_check.py", *steps]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "tests", "sanitizer", "benchmarks")
    assert done.returncode == 3
    want = "torch finds no GPU here, so these steps did not run: tests, sanitizer, benchmarks"
    assert done.stdout.splitlines()[-1] == f"gpu-check: {want}"
    assert want in (tmp_path / "summary.txt").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["torch"], summary["gpu"], summary["steps"]) == (torch.__version__, None, [])


def test_bad_steps_are_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "tests", "test")
    assert done.returncode == 2
    want = "expected STEP to be one of build, tests, sanitizer, benchmarks"
    assert f'gpu-check: {want}, got "test"' in done.stdout


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "NEEDED", ("torch", "no_such_package"))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert "got no no_such_package" in capsys.readouterr().out


def test_all_steps_fit_into_nine_minutes(check: gpu_check.Check) -> None:
    now = time.monotonic()
    assert check.deadline("benchmarks") - now < 9 * 60 - 10
    # A step that starts late takes nothing from those after it.
    for step, later in (("build", 370), ("tests", 240), ("sanitizer", 110)):
        assert check.deadline("benchmarks") - check.deadline(step) == pytest.approx(later)


def test_a_step_is_stopped_with_its_children(
    check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "deadline", lambda step: time.monotonic() + 0.5)
    check.run("tests", ["sh", "-c", "sleep 60 & echo $!; wait"])
    assert [r.outcome for r in check.results] == ["out of time"]
    assert check.results[0].seconds < 10
    child = Path("/proc") / (tmp_path / "tests.log").read_text().strip() / "status"
    deadline = time.monotonic() + 10
    while child.is_file() and "(zombie)" not in child.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_failed_step_does_not_stop_the_others(
    check: gpu_check.Check, capsys: pytest.CaptureFixture[str]
) -> None:
    check.run("tests", ["sh", "-c", "echo too bad; exit 7"])
    check.run("benchmarks", ["echo", "all well"], SOME="thing")
    assert [(r.outcome, r.last_line) for r in check.results] == [
        ("failed (7)", "too bad"),
        ("ok", "all well"),
    ]
    check.summary("closing")
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out[-5:-2]] == [
        ["step", "outcome"],
        ["tests", "failed"],
        ["benchmarks", "ok"],
    ]
    assert out[-1] == "closing"


def test_every_checker_runs(
    check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "sanitizer_places", lambda: str(tmp_path))
    check.sanitizer()
    assert [(r.outcome, r.last_line) for r in check.results] == [
        ("failed", "no compute-sanitizer was found")
    ]
    check.results.clear()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setattr(gpu_check, "sanitizer_places", lambda: str(program.parent))
    monkeypatch.setattr(check, "deadline", lambda step: time.monotonic() + 1)
    check.sanitizer()
    assert [(r.step, r.outcome) for r in check.results] == [
        ("memcheck", "ok"),
        ("racecheck", "failed (9)"),
        ("synccheck", "ok"),
        ("initcheck", "out of time"),
    ]
    log = (tmp_path / "sanitizer.log").read_text()
    for result in check.results:
        assert f"==== {result.step}\n" in log
        assert "--kernel-regex kns=torch_ext" in log
        assert f"--tool {result.step} {sys.executable} -m pytest" in log
    assert not list(tmp_path.glob("*.part"))


def test_long_logs_keep_both_ends(
    check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "LONGEST_LOG", 100)
    check.run("tests", [sys.executable, "-c", "print('first', '.' * 500, 'last')"])
    log = (tmp_path / "tests.log").read_text()
    assert log.startswith("first")
    assert log.endswith("last\n")
    assert len(log) < 150
